"""The networks themselves: their shapes, their sizes, and that they learn."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo import (
    FULL_SIZE,
    GPT,
    NETWORKS,
    MobileNetV2,
    UNet,
    ViT,
    logits_of,
    resnet18,
    resnet20,
    resnet50,
    roughen_batch_norms,
    train_steps,
    zero_some_gammas,
)

EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)

# torchvision's resnet18, resnet50, mobilenet_v2 and timm's vit_tiny_patch16_224 have these numbers to the last
# parameter, and so has OpenAI's small GPT-2; a ResNet-20 whose shortcuts pad with zeros has 2,752 fewer.
PARAMETERS = {
    "resnet20": (resnet20, 272_474),
    "resnet18": (resnet18, 11_689_512),
    "resnet18 for small images": (partial(resnet18, classes=10, small_images=True), 11_173_962),
    "resnet50": (resnet50, 25_557_032),
    "mobilenet_v2": (MobileNetV2, 3_504_872),
    "mobilenet_v2 of ten classes": (partial(MobileNetV2, classes=10), 2_236_682),
    "vit tiny": (ViT, 5_717_416),
    "gpt-2": (partial(GPT, 50_257, 1_024, width=768, layers=12, heads=12, tied=True), 124_439_808),
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize(("constructor", "expected"), PARAMETERS.values(), ids=PARAMETERS)
def test_has_as_many_parameters_as_published(constructor: type[nn.Module], expected: int) -> None:
    with torch.device("meta"):
        assert parameters(constructor()) == expected


def test_unet_is_the_papers_size() -> None:
    """31.0 million in the paper, which has no batch normalization but biases in its place."""
    with torch.device("meta"):
        assert parameters(UNet()) == pytest.approx(31.0e6, rel=0.005)


@EVERY_NETWORK
@pytest.mark.parametrize("size", [1, 3])
def test_result_has_a_logit_for_every_class(name: str, size: int) -> None:
    network = NETWORKS[name]
    model = network.make().eval()
    inputs, targets = network.batch(size)
    with torch.no_grad():
        logits = logits_of(model(*inputs))
    shape = (*targets.shape, logits.shape[-1]) if "gp" in name else (size, logits.shape[1], *targets.shape[1:])
    assert logits.shape == shape
    assert logits.isfinite().all()
    assert logits.shape[-1 if "gp" in name else 1] > targets.max()


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_fits_its_inputs(name: str) -> None:
    network = FULL_SIZE[name]
    inputs, targets = network.batch(1)
    with torch.device("meta"), torch.no_grad():
        logits = network.make().eval()(*(tensor.to("meta") for tensor in inputs))
    assert logits.numel() // targets.numel() > targets.max()
    assert logits.numel() % targets.numel() == 0


@EVERY_NETWORK
def test_same_seed_gives_the_same_network_and_batch(name: str) -> None:
    network = NETWORKS[name]
    one, same, other = (network.make(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    (inputs,), (again,), (different,) = ([network.batch(4, seed).inputs[0]] for seed in (1, 1, 2))
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, different)


@EVERY_NETWORK
def test_inputs_are_realistic(name: str) -> None:
    first = NETWORKS[name].example_inputs(64)[0]
    if first.is_floating_point():
        assert abs(first.mean()) < 0.3
        assert 0.7 < first.std() < 1.4
    else:
        assert first.unique().numel() > 48  # of 64 tokens


# One of each kind: whether the others learn depends on nothing but zoo/, and is in the long tests.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("resnet20", "unet", "gpt_tied") else pytest.mark.long)
        for name in NETWORKS
    ],
)
def test_learns(name: str) -> None:
    network = NETWORKS[name]
    losses = train_steps(network.make(), network, steps=20)
    assert sum(losses[-5:]) < 0.99 * sum(losses[:5])


def test_training_is_repeatable() -> None:
    network = NETWORKS["gpt"]  # which has a dropout
    runs = [train_steps(network.make(), network, steps=2, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "unet", "mlp", "transformers_resnet"])
def test_roughened_batch_norms_have_negative_and_zero_gammas(name: str) -> None:
    model = NETWORKS[name].make()
    roughen_batch_norms(model, seed=1)
    assert batch_norms(model)
    for module in batch_norms(model):
        assert (module.weight < 0).any()
        assert (module.weight > 0).any()
        assert (module.weight == 0).sum() == module.num_features // 8
        assert (module.running_mean != 0).all()
        assert (module.running_var != 1).all()
        assert (module.running_var > 0).all()


def test_roughened_batch_norms_are_repeatable() -> None:
    models = [NETWORKS["mlp"].make() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        roughen_batch_norms(model, seed)
    gammas = [torch.cat([module.weight for module in batch_norms(model)]) for model in models]
    assert torch.equal(gammas[0], gammas[1])
    assert not torch.equal(gammas[0], gammas[2])


def test_gammas_can_be_zeroed_again() -> None:
    network = NETWORKS["mlp"]
    model = network.make()
    roughen_batch_norms(model, seed=1)
    before = [int((module.weight == 0).sum()) for module in batch_norms(model)]
    train_steps(model, network, steps=3)
    assert all((module.weight == 0).sum() < zeros for module, zeros in zip(batch_norms(model), before, strict=True))
    zero_some_gammas(model, seed=1)
    assert [int((module.weight == 0).sum()) for module in batch_norms(model)] == before


@pytest.mark.slow
def test_transformers_is_imported_only_when_needed() -> None:
    code = "import sys, zoo; assert 'transformers' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
