"""``analyze_sensitivity``: which layers cannot bear quantization, at which width, and for which reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..preparation.batches import iterated
from ..preparation.report import preparation_report
from ..progress import progress_bar
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.layer_types import layer_type_of
from ..qat.qat_module_wrapper import QATModuleWrapper
from .calls import Calls, calls_of, run
from .checkpoint import Checkpoint, fingerprint_of_model, fingerprint_of_values, qualified_name
from .layer_groups import LayerGroup, activation_nodes, in_order, layer_groups, owner_of_activation
from .local_errors import ErrorEnergies, ErrorSplit, add_layer_error
from .measures import Comparison, Loss, Measure
from .sensitivity_report import ActivationSensitivity, LayerSensitivity, SensitivityReport
from .switching import at_width, in_analysis, left_float, nodes_of_width, switch, with_weight_nodes


def analyze_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Iterable[int] = (8, 4),
    *,
    activations: bool = True,
    loss: Loss | None = None,
    inputs: Callable[[Any], Any] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SensitivityReport:
    """Measures every quantized layer with weights of every width: what the outputs lose where it alone is quantized,
    what they win where it alone stays float, and what the error is made of; and every activation, on its grid.

    The reference is the model itself with its nodes switched off. It runs once; then the network runs twice per layer
    and width, and twice per activation; and with everything quantized, as prepared and at each width. The model is left
    as it was: modes, switches, buffers, parameters and the random state, also where an error or an interruption ends
    the analysis.

    Where a layer alone is quantized, its input has the grid that it was prepared with; without ``activations`` the
    input is float, and ``alone`` tells of the weight. Rounding of activations, alike at every width, is most of the
    error of many layers, and hides what a width costs: on few batches both errors are far from independent. All else in
    the report counts activations in either case.

    A weight has the node of the model where that has the width already, else a new one on the range that a
    configuration of that width gives the weight as it is now. So a model that was trained is measured as trained at its
    own width, and as rounded at others.

    Args:
        model: prepared, and calibrated or trained.
        batches: as for :func:`calibrate`; kept in memory, with the reference's outputs.
        bits: widths of weights, each 2 to 8.
        activations: measure activations, too. A layer then counts what enters it; what it and other operations return,
            for sums and tables that read it on integers, only activations count.
        loss: called as ``loss(outputs, batch)``; a number, the lower the better.
        inputs: called with a batch, gives what the model takes of it (a batch of its own form, for a loss that needs
            labels: ``inputs=lambda batch: batch[0]``); the batch itself by default.
        progress: show a bar (with rich).
        checkpoint: a JSON file that measurements are kept in, and that a later call goes on from. It is written after
            each of them, atomically. One of something else is refused: of another model or state of it, of other
            batches or inputs, of a loss of another name or value on the float outputs, or of another version of this
            package.

    Returns:
        The report. Errors are relative squared errors of the outputs, ratios of them in dB; where the outputs look
        like logits, also the agreement of their argmax (:class:`Measure` says how).

    Raises:
        TypeError: ``batches`` is itself a batch, or a batch does not fit the model's forward.
        ValueError: the model is not prepared, or has seen no data; no batches; ``bits`` are out of range; the
            checkpoint is of something else.
        ImportError: ``progress`` without rich.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> prepared = prepare(network, QATConfig(), (torch.randn(1, 8),))
        >>> calibrate(prepared, [torch.randn(32, 8)])
        >>> sensitivity = analyze_sensitivity(prepared, [torch.randn(32, 8)], bits=(8, 2))
        >>> sensitivity.names
        ('0', '2')
        >>> all(at_2.alone.snr < at_8.alone.snr for at_8, at_2 in zip(sensitivity.at(8), sensitivity.at(2)))
        True
    """
    widths = _checked(bits)
    report = preparation_report(model)
    groups = layer_groups(model)
    kept = list(iterated(batches))
    if not kept:
        raise ValueError("batches must hold at least one batch, got none")
    calls = calls_of(model, kept, inputs)
    subject = {
        "state": fingerprint_of_model(model),
        "batches": fingerprint_of_values(kept),
        "inputs": fingerprint_of_values(calls),
    }
    with in_analysis(model):
        analysis = _Analysis(model, groups, kept, calls, loss, activations)
        analysis.run_reference()
        # A name does not tell what a function computes; what it makes of the float outputs does.
        subject["loss"] = f"{qualified_name(loss)} {analysis.reference_loss:.5g}" if loss is not None else "none"
        analysis.results = Checkpoint(checkpoint, subject, f"a {type(model).__qualname__}")
        nodes = analysis.activations if activations else {}
        total = 1 + len(widths) * (1 + 2 * len(analysis.groups)) + 2 * len(nodes)
        with progress_bar("sensitivity", total, shown=progress) as analysis.advance:
            prepared = analysis.as_prepared()
            quantized = {width: analysis.everything(width) for width in widths}
            layers = tuple(analysis.layer(group, width) for group in analysis.groups for width in widths)
            measured = tuple(analysis.activation(name) for name in nodes)
    return SensitivityReport(
        layers,
        measured,
        prepared,
        quantized,
        analysis.reference_loss,
        report.target,
        _other_bytes(model, analysis.weights),
        {group.name: group.config for group in analysis.groups},
    )


class _Analysis:
    """The passes of one analysis; the model is in evaluation mode, and somebody restores it."""

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[LayerGroup, ...],
        batches: list[Any],
        calls: Calls,
        loss: Loss | None,
        with_inputs: bool,
    ) -> None:
        self.model = model
        self.with_inputs = with_inputs
        self.groups = groups
        self.batches = batches
        self.calls = calls
        self.loss = loss
        self.results = Checkpoint(None, {}, "")
        self.advance: Callable[[], None] = lambda: None
        self.reference: list[Any] = []
        self.reference_loss: float | None = None
        self.weights: dict[str, Tensor] = {}
        self.activations: dict[str, FakeQuantizeLayer] = {}  # by name, in the order in which they run
        self._nodes: dict[tuple[str, int], dict[str, FakeQuantizeLayer]] = {}

    def run_reference(self) -> None:
        """The float outputs, the order in which layers run, and the weights that they are called with."""
        called: dict[str, Tensor] = {}
        handles = [self._noting(name, node) for name, node in activation_nodes(self.model).items()]
        for group in self.groups:
            for name, wrapper in group.wrappers.items():

                def note(module: QATModuleWrapper, args: tuple[Any, ...], name: str = name) -> None:
                    if name not in called:
                        called[name], _ = module.parameters_of_call(*args[1:])

                handles.append(wrapper.register_forward_pre_hook(note))
        switch(self.model, on=False)
        comparison = Comparison(self.loss)
        for batch, call in zip(self.batches, self.calls, strict=True):
            outputs = run(self.model, call)
            self.reference.append(outputs)
            comparison.add(outputs, outputs, batch)
        for handle in handles:
            handle.remove()
        self.weights = called
        self.groups = in_order(self.groups, called)
        self.reference_loss = comparison.result().loss

    def _noting(self, name: str, node: FakeQuantizeLayer) -> RemovableHandle:
        """Takes an activation up when its node is called."""

        def note(module: FakeQuantizeLayer, args: tuple[Any, ...]) -> None:
            self.activations[name] = module

        return node.register_forward_pre_hook(note)

    def as_prepared(self) -> Measure:
        """Everything quantized, with the model's own weight nodes."""

        def measure() -> dict[str, Any]:
            switch(self.model, on=True)
            return {"outputs": self._pass().to_dict()}

        return Measure.from_dict(self._kept("as prepared", measure)["outputs"])

    def activation(self, name: str) -> ActivationSensitivity:
        """One activation: it alone on its grid, and everything but it as prepared."""
        node = self.activations[name]

        def measure(alone: bool) -> dict[str, Any]:
            switch(self.model, on=not alone)
            node.fake_quantize_enabled = alone
            return {"outputs": self._pass().to_dict()}

        alone = self._kept(f"activation alone {name}", partial(measure, True))
        all_but = self._kept(f"all but activation {name}", partial(measure, False))
        owner, role = owner_of_activation(name)
        return ActivationSensitivity(
            owner, role, node.scheme.bits, Measure.from_dict(alone["outputs"]), Measure.from_dict(all_but["outputs"])
        )

    def everything(self, bits: int) -> Measure:
        """All layers quantized, with weights of that width."""

        def measure() -> dict[str, Any]:
            with self._at_width(bits):
                return {"outputs": self._pass().to_dict()}

        return Measure.from_dict(self._kept(f"everything {bits}", measure)["outputs"])

    def layer(self, group: LayerGroup, bits: int) -> LayerSensitivity:
        """One layer at one width."""
        subject = "alone" if self.with_inputs else "weight alone"
        alone = self._kept(f"{subject} {bits} {group.name}", lambda: self._alone(group, bits))
        others = self._kept(f"all but {bits} {group.name}", lambda: self._all_but(group, bits))
        weights = {id(wrapper.weight_fake_quantize): name for name, wrapper in group.wrappers.items()}
        return LayerSensitivity(
            group.name,
            group.kind,
            bits,
            sum(self.weights[name].numel() for name in weights.values()),
            sum(node.scale.numel() for node in group.weight_nodes),
            Measure.from_dict(alone["outputs"]),
            Measure.from_dict(others["outputs"]),
            ErrorSplit(**alone["split"]),
        )

    def _kept(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        known: dict[str, Any] | None = self.results.get(key)
        if known is None:
            known = measure()
            self.results.put(key, known)
        self.advance()
        return known

    def _alone(self, group: LayerGroup, bits: int) -> dict[str, Any]:
        """Everything else float. The input, if it counts, is put on its grid for this layer alone, whoever else reads
        it."""
        energies = ErrorEnergies()
        switch(self.model, on=False)
        nodes = self._nodes_of(group, bits)

        def measure_input(wrapper: QATModuleWrapper, args: tuple[Any, ...]) -> tuple[Any, ...]:
            weight, bias = wrapper.parameters_of_call(*args[1:])
            quantized = add_layer_error(energies, wrapper, args[0], weight, bias)
            return (quantized if self.with_inputs else args[0], *args[1:])

        with with_weight_nodes(group.wrappers, nodes):
            for node in group.weight_nodes:
                node.fake_quantize_enabled = True
            hooks: list[Any] = [w.register_forward_pre_hook(measure_input) for w in group.wrappers.values()]
            try:
                outputs = self._pass()
            finally:
                for hook in hooks:
                    hook.remove()
        return {"outputs": outputs.to_dict(), "split": energies.split().to_dict()}

    def _all_but(self, group: LayerGroup, bits: int) -> dict[str, Any]:
        with self._at_width(bits), left_float(group):
            return {"outputs": self._pass().to_dict()}

    def _at_width(self, bits: int) -> AbstractContextManager[None]:
        switch(self.model, on=True)
        return at_width(self.groups, {group.name: self._nodes_of(group, bits) for group in self.groups})

    def _nodes_of(self, group: LayerGroup, bits: int) -> dict[str, FakeQuantizeLayer]:
        """The group's weight nodes of a width; a range of few bits takes a search, which is done once."""
        if (group.name, bits) not in self._nodes:
            self._nodes[group.name, bits] = nodes_of_width(group, self.weights, bits)
        return self._nodes[group.name, bits]

    def _pass(self) -> Measure:
        """All batches once."""
        comparison = Comparison(self.loss)
        for batch, call, reference in zip(self.batches, self.calls, self.reference, strict=True):
            comparison.add(run(self.model, call), reference, batch)
        return comparison.result()


def _checked(bits: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(bits, Iterable) or isinstance(bits, (str, bytes)):
        raise TypeError(f"bits must be an iterable of widths, got {bits!r}")
    widths = tuple(dict.fromkeys(bits))
    if not widths:
        raise ValueError("bits must hold at least one width, got none")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= 8:
            raise ValueError(f"bits must be ints between 2 and 8, got {width!r}")
    return widths


def _other_bytes(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Of parameters and buffers that are no weight of a quantized layer, and no state of quantization.

    A weight that a quantized layer shares with a float one is stored for each: as codes, and as it is.
    """
    held_by_float = {
        id(module._parameters.get("weight"))
        for module in model.modules()
        if layer_type_of(module) is not None and not isinstance(module, QATModuleWrapper)
    }
    nodes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FakeQuantizeLayer))
    counted = {id(tensor) for tensor in weights.values()} - held_by_float
    total = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in counted and not name.startswith(nodes):
            counted.add(id(tensor))
            total += tensor.nbytes
    return total
