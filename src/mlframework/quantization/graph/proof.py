"""Proves that a graph does what a model's own code does: values in evaluation; values, gradients and buffers in
training; and values with batches of other sizes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .containers import ends
from .decisions import is_guard
from .example_run import (
    Recorder,
    agree,
    failure,
    modules_kept,
    placeholder_values,
    plain,
    random_state_kept,
    requiring_grad,
    state_kept,
    values_agree,
)
from .nodes import owner_of, without_added
from .padded_positions import without_fused_encoders
from .values import tensors_of, with_tensors
from .watching import Observation

_DIFFERS = "its trace does not reproduce its {}"
_BATCH = "its code depends on the batch size"


def prove(
    model: nn.Module,
    graph: fx.Graph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    observations: Mapping[bool, Observation],
) -> dict[str, str]:
    """The modules of whose code the graph is no true account, with the reason; none where it is proved.

    Leaves :class:`.TensorInfo` at the nodes, and takes out guards that would refuse batches of another size although
    nothing hangs on them.

    Args:
        model: as it was when the observations were made.
        graph: with marks.
        args, kwargs: example inputs.
        arguments: the same, by the names of the placeholders.
        observations: what the model's own code did, in training and in evaluation.
    """
    with warnings.catch_warnings(), without_fused_encoders():
        warnings.simplefilter("ignore")  # what the model has to say, it says when it is called in earnest
        found: dict[str, str] = {}
        if "" not in observations[False].failed:
            model.train(False)
            found = _compare_values(model, graph, arguments, observations[False])
        if not found and "" not in observations[True].failed:
            model.train(True)
            found = _compare_gradients(model, graph, args, kwargs, arguments, observations[True])
        model.train(False)
        return found or _prove_other_batches(model, graph, args, kwargs, arguments)


def _compare_values(
    model: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any], seen: Observation
) -> dict[str, str]:
    """In evaluation, with what the model's own code was seen to return."""
    recorder = Recorder(model, graph, measures=True)
    with state_kept(model), torch.enable_grad():  # as it was seen: products round by what requires gradients
        try:
            actual = recorder.run(*placeholder_values(graph, requiring_grad(dict(arguments))))
        except Exception as error:
            return dict([failure(recorder, error)])
    for node, value in recorder.tensors.items():
        node.meta["tensor"] = value
    return {} if agree(seen.result, actual) else {_first_difference(recorder, seen): _DIFFERS.format("output")}


class _Run(NamedTuple):
    result: Any
    gradients: list[Tensor | None] | None
    buffers: list[Tensor]


def _compare_gradients(
    model: nn.Module,
    graph: fx.Graph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    seen: Observation,
) -> dict[str, str]:
    """In training, with another run of the model's own code: values, gradients and buffers."""
    recorder = Recorder(model, graph)

    def run_code(inputs: list[Tensor]) -> Any:
        own_args, own_kwargs = _with_tensors((args, dict(kwargs)), inputs)
        with without_added(model):
            return type(model).forward(model, *own_args, **own_kwargs)

    def run_graph(inputs: list[Tensor]) -> Any:
        return plain(recorder.run(*placeholder_values(graph, _with_tensors(dict(arguments), inputs))))

    tensors = tensors_of((args, dict(kwargs)))
    try:
        expected = _run(model, tensors, run_code)
    except Exception as error:  # it ran before
        return {"": f"it raises an error when it runs again ({(str(error).splitlines() or [''])[0]})"}
    try:
        actual = _run(model, tensors, run_graph)
    except Exception as error:
        return dict([failure(recorder, error)])
    if not agree(expected.result, actual.result):
        return {_first_difference(recorder, seen): _DIFFERS.format("output")}
    if not all(map(values_agree, expected.buffers, actual.buffers)):
        return {"": _DIFFERS.format("buffers")}
    if expected.gradients is not None and not (
        actual.gradients is not None and all(map(values_agree, expected.gradients, actual.gradients))
    ):
        return {"": _DIFFERS.format("gradients")}
    return {}


def _run(model: nn.Module, tensors: list[Tensor], function: Any) -> _Run:
    """A run with gradients, which leaves buffers and random generators as they were."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    with state_kept(model), torch.enable_grad():
        result = function([leaf.clone() for leaf in leaves])  # of which in-place operations are legal
        buffers = [buffer.clone() for buffer in model.buffers()]
        outputs = [tensor for tensor in tensors_of(result) if tensor.requires_grad]
        wanted = [tensor for tensor in (*leaves, *model.parameters()) if tensor.requires_grad]
        if not outputs or not wanted:
            return _Run(result, [], buffers)
        # Cotangents that tell the elements of an output apart.
        seeds = [torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output) for output in outputs]
        try:
            gradients = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
        except RuntimeError:  # what was saved for backward has been changed in place: a model for inference
            return _Run(result, None, buffers)
    return _Run(result, list(gradients), buffers)


def _with_tensors(structure: Any, tensors: list[Tensor]) -> Any:
    remaining = iter(tensors)
    return with_tensors(structure, lambda _: next(remaining))


def _first_difference(recorder: Recorder, seen: Observation) -> str:
    """The first container to end with another result than its own code's."""
    counts: dict[str, int] = {}
    for node, parts in recorder.ended:
        name = str(node.args[0])
        index = counts[name] = counts.get(name, -1) + 1
        calls = seen.calls.get(name, [])
        if index < len(calls):
            expected = tensors_of(calls[index].result)
            if len(expected) != len(parts) or not all(map(values_agree, expected, parts)):
                return name
    return ""


def _prove_other_batches(
    model: nn.Module, graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, str]:
    """The values for batches of other sizes, a small and a large one, where the model takes such.

    Code that expands what would broadcast anyway (``if positions.shape[0] != batch``) asks for the batch size, and its
    answer for one example differs from that for many. Where the graph computes what the model computes on both other
    batches as well, the guards that would have stopped it go.
    """
    tensors = [tensor for tensor in tensors_of(dict(arguments)) if tensor.dim() > 0]
    if not tensors or tensors[0].shape[0] == 0:
        return {}
    batch = tensors[0].shape[0]
    idle: dict[fx.Node, None] = {}
    for size in (1, 2 * batch + 1):
        if size == batch:
            continue
        rows = torch.arange(size) % batch

        def resize(tensor: Tensor, rows: Tensor = rows) -> Tensor:
            has_batch = tensor.dim() > 0 and tensor.shape[0] == batch
            return tensor.detach()[rows.to(tensor.device)] if has_batch else tensor.detach().clone()

        runner = _PastGuards(model, graph)
        with state_kept(model):
            try:
                with (
                    random_state_kept(),
                    modules_kept(model),
                    without_added(model),
                    _results_of(model, graph) as results,
                ):
                    expected = type(model).forward(
                        model, *with_tensors(args, resize), **with_tensors(dict(kwargs), resize)
                    )
            except Exception:  # it takes no batch of another size
                continue
            values = with_tensors(dict(arguments), resize)
            try:
                # Container by container: what differs inside may vanish on the way out.
                same = agree(expected, runner.run(*placeholder_values(graph, values))) and agree(
                    results, [tensors for _, tensors in runner.ended]
                )
            except Exception:  # what was decided for one size does not run on the other
                same = False
        if not same:
            stopped = runner.stopping or ([] if runner.running is None else [runner.running])
            return {owner_of(node): _BATCH for node in stopped} or {"": _BATCH}
        idle.update(dict.fromkeys(runner.stopping))
    for guard in idle:
        graph.erase_node(guard)
    return {}


@contextmanager
def _results_of(model: nn.Module, graph: fx.Graph) -> Iterator[list[list[Tensor]]]:
    """Fills a list with the tensors that the containers in a graph return while the model's own code runs."""
    results: list[list[Tensor]] = []

    def keep(module: nn.Module, args: Any, result: Any) -> None:
        results.append([tensor.detach().clone() for tensor in tensors_of(result)])

    names = dict.fromkeys(str(node.args[0]) for node in graph.find_nodes(op="call_function", target=ends))
    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield results
    finally:
        for handle in handles:
            handle.remove()


class _PastGuards(Recorder):
    """Runs a graph whatever its guards say, and notes which would have stopped it."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph)
        self.stopping: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        if is_guard(n):
            holds, _ = self.fetch_args_kwargs_from_env(n)[0]
            if not holds:
                self.stopping.append(n)
            return None
        return super().run_node(n)
