"""Recipes: what is found in a network, and that a recipe trains it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import zoo
from mlframework.quantization import calibrate, finetune, prepare, recommended_recipe
from mlframework.quantization.training.network_traits import network_traits


@pytest.mark.parametrize(
    ("name", "has_batch_norm", "is_depthwise", "is_transformer"),
    [
        ("resnet20", True, False, False),
        ("mobilenet_v2", True, True, False),
        ("gpt", False, False, True),
        ("vit", False, False, True),
    ],
)
def test_networks_are_told_apart(name: str, has_batch_norm: bool, is_depthwise: bool, is_transformer: bool) -> None:
    network = zoo.NETWORKS[name].make()
    traits = network_traits(network)
    assert (traits.has_batch_norm, traits.is_depthwise, traits.is_transformer) == (
        has_batch_norm,
        is_depthwise,
        is_transformer,
    )
    assert len(traits.blocks) > 1
    assert all(list(network.get_submodule(block).children()) for block in traits.blocks)


def test_a_chain_of_layers_has_no_blocks() -> None:
    traits = network_traits(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3)))
    assert traits.blocks == ()
    assert traits.is_transformer
    assert not network_traits(nn.Conv2d(1, 4, 3)).is_depthwise  # one input channel is not a group for each


def test_bits_and_steps_decide() -> None:
    network = zoo.NETWORKS["mobilenet_v2"].make()
    assert not recommended_recipe(8, 1000, network).config.learnable
    assert recommended_recipe(8, 1000, network).observe_until == 0.7
    assert recommended_recipe(8, 1000, zoo.NETWORKS["resnet20"].make()).observe_until == 0
    assert recommended_recipe((8, 4), 1000, network).vector_lr_factor == 1
    low = recommended_recipe((4, 8), 1000, network)
    assert low.lr is None
    assert low.vector_lr_factor == 10
    assert low.config.learnable
    assert (low.config.weight_bits, low.config.activation_bits) == (4, 8)
    assert low.freeze_oscillations
    assert not recommended_recipe((4, 8), 100, network).freeze_oscillations
    assert "depthwise" in str(low)
    assert "blocks" in str(low)
    assert low.calibration == ("round_weights",)
    assert recommended_recipe(8, 1000, network).calibration == ("round_weights",)
    assert recommended_recipe(8, 1000, zoo.NETWORKS["gpt"].make()).calibration == ()
    with pytest.raises(ValueError, match="steps must be a positive int"):
        recommended_recipe(8, 0, network)
    with pytest.raises(ValueError, match="weight_bits must be"):
        recommended_recipe(9, 10, network)


class Branches(nn.Module):
    """Blocks in a dictionary of lists, one of which its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.ModuleList([Block(8), Block(8)]) for name in ("used", "spare")})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.branches["used"]:
            inputs = block(inputs)
        return inputs


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(inputs))


def test_blocks_that_a_forward_never_calls_are_left_out() -> None:
    model, inputs = Branches(), torch.randn(8, 8)
    teacher = copy.deepcopy(model)
    recipe = recommended_recipe(4, 4, model)
    assert len(recipe.features) == 4
    prepared = prepare(model, recipe.config, (inputs,))
    calibrate(prepared, [inputs], method=recipe.calibration)
    with pytest.warns(UserWarning, match=r"which these are not: branches\.spare\.0, branches\.spare\.1"):
        history = finetune(prepared, teacher, [inputs], steps=4, recipe=recipe)
    assert len(history.losses) == 4
    with pytest.raises(ValueError, match=r"modules that both models call, got branches\.spare\.0"):
        finetune(prepared, teacher, [inputs], steps=1, recipe=replace(recipe, features=("branches.spare.0",)))


# What is done with resnet20 is a part of what is done with mobilenet_v2, which has depthwise convolutions, too.
@pytest.mark.parametrize("name", [pytest.param("resnet20", marks=pytest.mark.long), "mobilenet_v2", "vit"])
def test_a_recipe_trains(name: str) -> None:
    network = zoo.NETWORKS[name]
    model = network.make().eval()
    # Two batches: on what it is calibrated on, rounding is as near as training comes.
    inputs, others = network.example_inputs(8), network.example_inputs(8, seed=1)
    teacher = copy.deepcopy(model)
    recipe = recommended_recipe((4, 8), 20, model)
    prepared = prepare(model, recipe.config, inputs)
    calibrate(prepared, [inputs], method=recipe.calibration)
    history = finetune(prepared, teacher, [others], steps=20, recipe=recipe)
    assert torch.isfinite(torch.tensor(history.losses)).all()
    assert min(history.losses[6:]) < history.losses[0]


def test_scales_move_less_on_grids_of_many_codes() -> None:
    rates = {bits: recommended_recipe(bits, 100, nn.Linear(3, 3)).quantization_lr for bits in ((4, 8), (4, 4), 2)}
    assert rates == {(4, 8): 1e-4, (4, 4): 1e-3, 2: 1e-3}
