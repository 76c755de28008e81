"""Measurements of the digits demo: do the integers agree, and how long does each model take?"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mlframework.quantization import FakeQuantizeLayer, quantize

_WARM_UP = 10
_ROUNDS = 50


class Comparison(NamedTuple):
    """What differs between the prepared model in evaluation and the converted one."""

    mismatched_codes: int
    compared_codes: int
    mismatched_logits: int
    reloaded_mismatched_logits: int

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return self.mismatched_codes == self.mismatched_logits == self.reloaded_mismatched_logits == 0

    def __str__(self) -> str:
        return (
            f"{self.mismatched_codes} of {self.compared_codes:,} integer codes differ between the prepared model in "
            f"eval() and the converted one, over the whole test set; of the logits, bit for bit, "
            f"{self.mismatched_logits} differ ({self.reloaded_mismatched_logits} after loading from the file)."
        )


def activation_nodes(prepared: nn.Module) -> dict[str, FakeQuantizeLayer]:
    """The nodes that quantize activations, by the name of the module whose output they are.

    ``convert`` puts a module of the same name in that place, which gives the codes.
    """
    return {
        name.removesuffix(".output_fake_quantize"): module
        for name, module in prepared.named_modules()
        if isinstance(module, FakeQuantizeLayer) and not name.endswith("weight_fake_quantize")
    }


@torch.no_grad()
def count_mismatches(prepared: nn.Module, converted: nn.Module, reloaded: nn.Module, images: Tensor) -> Comparison:
    """Compares every quantized edge code by code, and the logits bit for bit."""
    nodes = activation_nodes(prepared)
    values, logits = _outputs(prepared.eval(), nodes, images)
    codes, converted_logits = _outputs(converted, nodes, images)
    mismatched = sum(
        int((quantize(values[name], node.parameters_on_grid) != codes[name]).sum()) for name, node in nodes.items()
    )
    return Comparison(
        mismatched_codes=mismatched,
        compared_codes=sum(edge.numel() for edge in codes.values()),
        mismatched_logits=_differing_bits(logits, converted_logits),
        reloaded_mismatched_logits=_differing_bits(converted_logits, reloaded(images)),
    )


def _outputs(model: nn.Module, names: Iterable[str], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the named modules put out on the way to the logits."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(keep, name)))
        logits: Tensor = model(images)
    return outputs, logits


def _differing_bits(left: Tensor, right: Tensor) -> int:
    return int((left.view(torch.int32) != right.view(torch.int32)).sum())


def reload_into(model: nn.Module, path: Path) -> nn.Module:
    """Loads a file into a converted model, every key of it and no other."""
    model.load_state_dict(load_file(path))
    return model


def median_latencies(models: Mapping[str, nn.Module], images: Tensor, *, simulated: str) -> dict[str, float]:
    """Median milliseconds of a call, by name; the model called ``simulated`` runs with gradients enabled.

    The models take turns, so that whatever else the machine does meets them all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    names, order = list(models), random.Random(0)
    for turn in range(_WARM_UP + _ROUNDS):
        order.shuffle(names)  # no model always finds the caches as the same other model left them
        for name in names:
            with torch.set_grad_enabled(name == simulated):
                start = time.perf_counter()
                models[name](images)
                elapsed = time.perf_counter() - start
            if turn >= _WARM_UP:
                times[name].append(1e3 * elapsed)
    return {name: round(statistics.median(values), 4) for name, values in times.items()}
