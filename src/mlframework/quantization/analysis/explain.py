"""``explain``: along the network, where the error comes in, and what usually helps there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.example_run import copies
from ..preparation.batches import arguments_of, iterated
from ..preparation.report import preparation_report
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from ..verification.recording import quantized_layers
from .advice import Evidence, advice_for
from .explanation import Explanation, LayerExplanation
from .float_reference import Call, was_trained_since, with_state_of
from .layer_groups import layer_groups
from .measures import Comparison, relative, squared_sum
from .own_errors import OwnErrors
from .switching import in_analysis, switch


def explain(
    float_model: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    threshold: float = 20.0,
    inputs: Callable[[Any], Any] | None = None,
) -> Explanation:
    """Compares a prepared model with the float network layer by layer, and says which layer breaks first and why.

    Each output is compared with that of the same module in the same graph with its nodes off: after the batch
    normalization and the activation that run with a layer. Beside it stands what the module makes of a float input, its
    own error, taken apart into weight, clipping and rounding. The first layer that breaks is the first, in the order in
    which they run, whose output is below ``threshold`` and at least half of whose error is its own; one that only hands
    on what came in is not to blame.

    Both models are left as they were.

    Args:
        float_model: the network that ``model`` was prepared from; if ``model`` was trained since, a copy made before.
            The first batch is tried out: it has to compute what ``model`` does with its nodes off or, with Parameters
            of its own, what ``model`` does with these in place. (Without batch normalization a network that shares
            trained Parameters passes: the error is then that of quantizing the weights as they are now.)
        model: prepared, and calibrated or trained.
        batches: as for :func:`calibrate`.
        threshold: signal-to-noise ratio of an output in dB below which it counts as broken. At 20 dB errors are a
            tenth of the signal.
        inputs: called with a batch, gives what the model takes of it; the batch itself by default.

    Raises:
        TypeError: a model is none, or ``batches`` is itself a batch.
        ValueError: ``model`` has seen no data; no batches; ``float_model`` is another network, is prepared, or shares
            Parameters that were changed since.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> prepared = prepare(network, QATConfig(weight_bits=2), (torch.randn(1, 8),))
        >>> calibrate(prepared, [torch.randn(32, 8)])
        >>> explanation = explain(network, prepared, [torch.randn(32, 8)])
        >>> explanation.first_break.name
        '0'
        >>> print(explanation.first_break.advice)
        rounding its weight is most of its error: more bits for it (weight_bits=4), or AdaRound
    """
    preparation_report(model)
    layer_groups(model)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number of dB, got {threshold!r}")
    comparison = _LayerComparison(model)
    outputs, seen, trained = Comparison(), 0, False
    with in_analysis(model):
        for batch in iterated(batches):
            call = arguments_of(model, batch if inputs is None else inputs(batch))
            if seen == 0:
                trained = was_trained_since(model, float_model, call)
            reference = comparison.observe_float(call, float_model if trained else None)
            outputs.add(comparison.observe_quantized(call), reference, batch)
            seen += 1
    if seen == 0:
        raise ValueError("batches must hold at least one batch, got none")
    layers = tuple(_with_advice(layer, comparison.evidence_of(layer), threshold) for layer in comparison.layers())
    return Explanation(layers, outputs.result(), float(threshold), trained)


def _with_advice(layer: LayerExplanation, evidence: Evidence, threshold: float) -> LayerExplanation:
    if layer.breaks(threshold) or layer.own_snr < threshold:
        return replace(layer, advice=advice_for(evidence))
    return layer


class _LayerComparison:
    """What the modules return, in the float network and in the quantized one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: model.get_submodule(name) for name in quantized_layers(model)}
        self.own: dict[str, OwnErrors] = {}
        self.energies: dict[str, tuple[float, float]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def observe_float(self, call: Call, float_model: nn.Module | None) -> Any:
        """Runs with the nodes off: each module's own errors, then the outputs to compare with, which are those with the
        weights of ``float_model`` where that is given. Returns the network's result."""
        self.outputs = {}
        switch(self.model, on=False)
        keeps = float_model is None

        def note(name: str, args: tuple[Any, ...], output: Tensor) -> None:
            self.own.setdefault(name, OwnErrors(self.modules[name])).add(args, output)
            if keeps:
                self._keep(name, args, output)

        with self._noting(note):
            result = self._run(call)
        if float_model is not None:
            with with_state_of(self.model, float_model), self._noting(self._keep):
                result = self._run(call)
        return result

    def observe_quantized(self, call: Call) -> Any:
        """Runs with the nodes on, and compares. Returns the network's result."""
        switch(self.model, on=True)
        with self._noting(self._compare):
            return self._run(call)

    def _keep(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        self.outputs.setdefault(name, []).append(output.detach().clone())  # what follows may change it in place

    def _compare(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        waiting = self.outputs.get(name)
        if not waiting or waiting[0].shape != output.shape:  # control flow on values went another way
            return
        expected = waiting.pop(0)
        error, signal = self.energies.get(name, (0.0, 0.0))
        self.energies[name] = (error + squared_sum(output - expected), signal + squared_sum(expected))

    @contextmanager
    def _noting(self, note: Callable[[str, tuple[Any, ...], Tensor], None]) -> Iterator[None]:
        def hook(name: str) -> Any:
            def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                    note(name, args, output)

            return call

        handles = [module.register_forward_hook(hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, call: Call) -> Any:
        args, kwargs = call
        with torch.no_grad():
            return self.model(*copies(args), **copies(kwargs))

    def layers(self) -> list[LayerExplanation]:
        """All that ran, in that order."""
        found = []
        for name, own in self.own.items():
            if name in self.energies:
                error = relative(*self.energies[name])
                kind = _kind(self.modules[name])
                found.append(
                    LayerExplanation(name, kind, error, own.split, own.channel_ratio, own.peak, own.mean_share)
                )
        return found

    def evidence_of(self, layer: LayerExplanation) -> Evidence:
        """What the advice for a layer goes by."""
        module = self.modules[layer.name]
        weight: FakeQuantizeLayer | None = None
        if isinstance(module, QATModuleWrapper):
            weight, grid = module.weight_fake_quantize, module.output_fake_quantize or module.input_fake_quantize
        else:
            grid = module.output_fake_quantize if isinstance(module, QATOperation) else None
        if isinstance(module, FakeQuantizeLayer):
            grid = module
        return Evidence(
            layer.own,
            None if weight is None else weight.scheme,
            None if grid is None else grid.scheme,
            layer.channel_ratio,
            layer.peak,
            layer.mean_share,
        )


def _kind(module: nn.Module) -> str:
    if isinstance(module, QATModuleWrapper):
        return type(module.layer).__name__
    return module.operation.kind if isinstance(module, QATOperation) else "fake quantize"
