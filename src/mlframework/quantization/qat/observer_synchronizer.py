"""Statistics of all observers of a model, reduced over ranks together and folded in together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import kernels
from .activation_observer import ActivationObserver, BatchStatistics
from .recomputation import ForwardHistory, State, is_recomputing, may_be_recomputed
from .sharding import is_managed, reshard, run_after_fsdp, unshard_nodes


class ObservedLayer(Protocol):
    """What a layer must offer to have its observer updated with those of the whole model."""

    observer: ActivationObserver
    learnable: bool
    synchronizer: ObserverSynchronizer | None
    synchronizer_index: int
    training: bool

    @property
    def observes(self) -> bool:
        """Whether the next forward feeds the observer."""

    @property
    def is_initialized(self) -> bool:
        """Whether data has set the layer's parameters."""

    @property
    def state(self) -> State:
        """A copy of the buffers that :meth:`commit` changes and a forward reads."""

    def commit(self, statistics: BatchStatistics) -> None:
        """Folds statistics in and recomputes what follows from them."""


class ObserverSynchronizer:
    """Collects what a model's observers measure during one forward and folds it in when the forward ends.

    Every layer of the model quantizes with what earlier steps have shown, and updates land after the forward: so all
    ranks compute the same function in a step, whatever part of the data they see, and one all-reduce for the whole
    model keeps them agreed. A run in one process takes the same order, and so the same values.

    A step that the optimizer then does not take (``torch.amp.GradScaler`` skips one whose gradients are not finite)
    has shown its batch all the same, as it has to batch normalization: the batch is one of the data, and where its
    values were not finite, its extremes are ignored.

    Args:
        layers: the layers whose observers belong together, in an order that all ranks share.
    """

    def __init__(self, layers: Sequence[ObservedLayer]) -> None:
        self.layers = layers
        self.pending: dict[int, BatchStatistics] = {}
        self.history = ForwardHistory()
        self.has_warned = False
        for index, layer in enumerate(layers):
            layer.synchronizer = self
            layer.synchronizer_index = index

    def defer(self, index: int, statistics: BatchStatistics) -> None:
        """Holds what the layer of that index measured until :meth:`commit`; a second batch joins the first."""
        if not self.history.is_kept and self.layers[index].training and may_be_recomputed():
            self.history.is_kept = True
        held = self.pending.get(index)
        self.pending[index] = statistics if held is None else _joined(held, statistics)

    @property
    def sets_sharded_parameters(self) -> bool:
        """Whether the next commit may give learned scales that FSDP manages their first values: on all ranks alike, for
        a rank may have had no data for a layer that another one has."""
        return any(
            is_managed(layer) and layer.learnable and layer.observes and not layer.is_initialized
            for layer in self.layers
        )

    def discard(self) -> None:
        """Drops what a forward that did not end has left behind."""
        self.pending.clear()
        if not kernels.is_traced():
            self.history.begin()

    def commit(self) -> None:
        """Reduces over ranks, updates every layer and forgets."""
        pending = dict(self.pending)
        self.pending.clear()
        if is_distributed():
            # A rank whose forward took another branch, or that had an empty batch, takes part with nothing seen: all
            # ranks pack the same layers, in every forward in which any layer observes.
            indices = [index for index, layer in enumerate(self.layers) if layer.observes]
            statistics = [
                pending[index] if index in pending else self.layers[index].observer.nothing() for index in indices
            ]
            reduced = reduce_over_ranks(statistics)
            pending = {
                index: batch
                for index, batch in zip(indices, reduced, strict=True)
                # Only a layer that this rank has never reached has to ask whether another one has.
                if index in pending or self.layers[index].is_initialized or bool(torch.isfinite(batch.extremes).any())
            }
        if self.history.is_kept and not kernels.is_traced():
            self.history.end({index: self.layers[index].state for index in pending})
        for index, batch in pending.items():
            self.layers[index].commit(batch)


def discard_statistics(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a prepared model."""
    if not is_recomputing():
        synchronizer: ObserverSynchronizer = module.observer_synchronizer  # type: ignore[assignment]
        unshard_nodes(synchronizer.layers)
        run_after_fsdp(module, commit_statistics)
        synchronizer.discard()


def commit_statistics(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a prepared model."""
    if not is_recomputing():
        synchronizer: ObserverSynchronizer = module.observer_synchronizer  # type: ignore[assignment]
        if not kernels.is_traced() and synchronizer.sets_sharded_parameters:
            reshard(module, synchronizer.layers)
        synchronizer.commit()


def reduce_over_ranks(statistics: list[BatchStatistics]) -> list[BatchStatistics]:
    """All-reduces packed statistics: one collective for the extremes and, where there are histograms, one for those."""
    if not is_distributed() or not statistics:
        return statistics
    extremes = _all_reduce([batch.extremes for batch in statistics], dist.ReduceOp.MAX)
    counted = [batch.counts for batch in statistics if batch.counts is not None]
    counts = iter(_all_reduce(counted, dist.ReduceOp.SUM) if counted else [])
    return [
        BatchStatistics(reduced, None if batch.counts is None else next(counts))
        for batch, reduced in zip(statistics, extremes, strict=True)
    ]


def mean_over_ranks(number: Tensor) -> Tensor:
    """The mean of what each rank has measured, on all ranks; of one process, the number itself."""
    if not is_distributed():
        return number
    total = number.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def is_distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(tensors: list[Tensor], operation: Any) -> list[Tensor]:
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed, operation)
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _joined(first: BatchStatistics, second: BatchStatistics) -> BatchStatistics:
    counts = None if first.counts is None or second.counts is None else first.counts + second.counts
    return BatchStatistics(torch.maximum(first.extremes, second.extremes), counts)
