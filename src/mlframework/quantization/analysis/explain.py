"""``explain``: along the network, where the error comes in, and what usually helps there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..preparation.batches import iterated
from ..preparation.report import preparation_report
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from ..scheme import QuantizationScheme
from ..verification.recording import quantized_layers
from .advice import Evidence, advice_for
from .calls import Call, Calls, calls_of, run
from .explanation import LARGEST, Explanation, LayerExplanation
from .float_reference import was_trained_since, with_state_of
from .layer_groups import layer_groups
from .measures import Comparison, energies_of, relative
from .own_errors import OwnErrors, output_node
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
    if not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model must be a torch.nn.Module, got {type(float_model).__name__}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number of dB, got {threshold!r}")
    kept = list(iterated(batches))
    return explanation_of(model, calls_of(model, kept, inputs), float_model, float(threshold))


def explanation_of(
    model: nn.Module, calls: Calls, float_model: nn.Module | None = None, threshold: float = 20.0
) -> Explanation:
    """:func:`explain` for calls of the model; without a float model, against the model with its nodes off.

    Raises:
        ValueError: as there.
    """
    preparation_report(model)
    layer_groups(model)
    if not calls:
        raise ValueError("batches must hold at least one batch, got none")
    comparison, outputs = _LayerComparison(model), Comparison()
    with in_analysis(model):
        trained = float_model is not None and was_trained_since(model, float_model, calls[0])
        for call in calls:
            reference = comparison.observe_float(call, float_model if trained else None)
            outputs.add(comparison.observe_quantized(call), reference, None)
    layers = [comparison.layer(name) for name in comparison.compared]
    blamed = {layer.name for layer in layers if layer.breaks(threshold) or layer.own_snr < threshold}
    if not blamed and outputs.result().snr < threshold:
        blamed = {layer.name for layer in sorted(layers, key=lambda layer: layer.own_snr)[:LARGEST]}
    advised = (comparison.with_advice(layer) if layer.name in blamed else layer for layer in layers)
    return Explanation(tuple(advised), outputs.result(), threshold, trained)


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
            result = run(self.model, call)
        if float_model is not None:
            with with_state_of(self.model, float_model), self._noting(self._keep):
                result = run(self.model, call)
        return result

    def observe_quantized(self, call: Call) -> Any:
        """Runs with the nodes on, and compares. Returns the network's result."""
        switch(self.model, on=True)
        with self._noting(self._compare):
            return run(self.model, call)

    def _keep(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        self.outputs.setdefault(name, []).append(output.detach().clone())  # what follows may change it in place

    def _compare(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        waiting = self.outputs.get(name)
        if not waiting or waiting[0].shape != output.shape:  # control flow on values went another way
            return
        expected = waiting.pop(0)
        error, signal = self.energies.get(name, (0.0, 0.0))
        more_error, more_signal = energies_of(output, expected)
        self.energies[name] = (error + more_error, signal + more_signal)

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

    @property
    def compared(self) -> list[str]:
        """The modules that ran, in that order."""
        return [name for name in self.own if name in self.energies]

    def layer(self, name: str) -> LayerExplanation:
        """What was found of one module."""
        own, module = self.own[name], self.modules[name]
        weight, grid = _schemes(module)
        return LayerExplanation(
            name,
            _kind(module),
            relative(*self.energies[name]),
            own.split,
            own.channel_ratio,
            own.peak,
            own.mean_share,
            None if weight is None else weight.bits,
            None if grid is None else grid.bits,
        )

    def with_advice(self, layer: LayerExplanation) -> LayerExplanation:
        """The same, with what usually helps."""
        grids = _schemes(self.modules[layer.name])
        evidence = Evidence(layer.own, *grids, layer.channel_ratio, layer.peak, layer.mean_share)
        return replace(layer, advice=advice_for(evidence))


def _schemes(module: nn.Module) -> tuple[QuantizationScheme | None, QuantizationScheme | None]:
    """The grids of the weight and of the output (or the input) of a module."""
    weight, node = None, output_node(module)
    if isinstance(module, QATModuleWrapper):
        weight, node = module.weight_fake_quantize, node or module.input_fake_quantize
    return None if weight is None else weight.scheme, None if node is None else node.scheme


def _kind(module: nn.Module) -> str:
    if isinstance(module, QATModuleWrapper):
        return type(module.layer).__name__
    return module.operation.kind if isinstance(module, QATOperation) else "fake quantize"
