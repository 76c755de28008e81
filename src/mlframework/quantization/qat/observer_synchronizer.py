"""Statistics of all observers of a model, reduced over ranks together and folded in together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import kernels
from .activation_observer import ActivationObserver, BatchStatistics
from .data_parallel import Joinable, JoinHook, after_reducing_gradients, require_joined
from .recomputation import ForwardHistory, RecomputedLayer, is_recomputing
from .scale_projection import remember_shards
from .sharding import is_managed, reshard, run_after_fsdp, run_before_fsdp, unshard_nodes


class ObservedLayer(RecomputedLayer, Protocol):
    """What a layer must offer to have its observer updated with those of the whole model."""

    name: str
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

    def commit(self, statistics: BatchStatistics) -> None:
        """Folds statistics in and recomputes what follows from them."""


class ObserverSynchronizer(Joinable):
    """Collects what a model's observers measure during one forward and folds it in when the forward ends.

    Every layer of the model quantizes with what earlier steps have shown, and updates land after the forward: so all
    ranks compute the same function in a step, whatever part of the data they see, and one all-reduce for the whole
    model keeps them agreed. A run in one process takes the same order, and so the same values.

    Where DistributedDataParallel has wrapped the model, the all-reduce follows on that of the gradients, at the end of
    backward: there the ranks wait for one another anyway. (If backward never comes, it takes place when the next
    forward begins.)

    A step that the optimizer then does not take (``torch.amp.GradScaler`` skips one whose gradients are not finite)
    has shown its batch all the same, as it has to batch normalization: the batch is one of the data, and where its
    values were not finite, its extremes are ignored.

    Where ranks have different numbers of batches it is listed behind the model:
    ``Join([parallel, parallel.module.observer_synchronizer])``. A rank that has run out then takes part in the
    all-reduce with nothing seen.

    Args:
        layers: the layers whose observers belong together, in an order that all ranks share.
    """

    def __init__(self, layers: Sequence[ObservedLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.pending: dict[int, BatchStatistics] = {}
        # Indices of the layers that observed the forward which has ended, until its statistics have landed.
        self.due: list[int] = []
        self.history = ForwardHistory()
        self.is_traced = False  # whether the latest forward was compiled from its beginning
        self.has_warned = False
        for index, layer in enumerate(layers):
            layer.synchronizer = self
            layer.synchronizer_index = index

    def defer(self, index: int, statistics: BatchStatistics) -> None:
        """Holds what the layer of that index measured until :meth:`commit`; a second batch joins the first."""
        if kernels.is_traced():
            if not self.is_traced:  # but a part of it, which a checkpoint may run alone
                kernels.refuse_recomputation(self.layers[index].observer.batches)
        elif self.layers[index].training:
            self.history.observe()
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

    def begin_forward(self, model: nn.Module | None) -> None:
        """Lets the statistics land of a forward whose backward never came, and drops those of one that did not end.

        Raises:
            RuntimeError: within ``Join``, which does not list this synchronizer behind the model.
        """
        self.is_traced = kernels.is_traced()
        if self.is_traced:
            self.pending.clear()
            return
        observes = any(layer.observes for layer in self.layers)
        if observes:  # one rank alone may evaluate, which leaves what is due to the next forward that observes
            self.commit()
        if not self.due:
            self.pending.clear()
        require_joined(model, self, lambda: observes)
        self.history.begin()

    def end_forward(self, model: nn.Module | None, output: Any) -> None:
        """Has the statistics land: now, or when DistributedDataParallel has reduced the gradients."""
        if is_distributed():
            observed = [index for index, layer in enumerate(self.layers) if layer.observes]
        else:
            observed = list(self.pending)
        if not kernels.is_traced():
            self.history.end()
        if not observed:
            return
        self.due = observed
        if not (is_distributed() and after_reducing_gradients(model, output, self.commit)):
            self.commit()

    def commit(self) -> None:
        """Reduces over ranks, updates every layer and forgets: what a forward has shown that has ended, if any."""
        if not self.due:
            return
        pending, due = self.pending, self.due
        self.pending, self.due = {}, []
        if is_distributed():
            # All ranks pack all layers, whichever of them this rank's forward has reached or observes: another branch
            # or an empty batch takes part with nothing seen.
            statistics = [
                pending[index] if index in pending else layer.observer.nothing()
                for index, layer in enumerate(self.layers)
            ]
            try:
                reduced = reduce_over_ranks(statistics)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the statistics of {len(self.layers)} observers, from {self.layers[0].name} to "
                    f"{self.layers[-1].name}, could not be reduced over {dist.get_world_size()} ranks, all of which "
                    f"have to run as many training forwards, each observing: {error}"
                ) from error
            pending = {
                index: reduced[index]
                for index in due
                # Only a layer that this rank has never reached has to ask whether another one has.
                if index in pending
                or self.layers[index].is_initialized
                or bool(torch.isfinite(reduced[index].extremes).any())
            }
        if kernels.is_traced():
            self.history.is_compiled = bool(pending)
            if pending:
                kernels.refuse_recomputation(self.layers[next(iter(pending))].observer.batches)
        else:
            pending = {index: batch for index, batch in pending.items() if not self._starts_from_nothing(index, batch)}
            self.history.replace({index: self.layers[index] for index in pending})
        for index, batch in pending.items():
            self.layers[index].commit(batch)

    def _starts_from_nothing(self, index: int, batch: BatchStatistics) -> bool:
        """Whether a layer's first batch has no finite values, of which no scale can be made."""
        return not self.layers[index].is_initialized and not bool(torch.isfinite(batch.extremes).any())

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What ``torch.distributed.algorithms.join.Join`` runs on a rank that has no more batches."""
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """The observers' device."""
        return self.layers[0].observer.batches.device if self.layers else torch.device("cpu")

    @property
    def join_process_group(self) -> Any:
        """All ranks, which statistics are reduced over."""
        return dist.group.WORLD


class _Shadow(JoinHook):
    """Takes part, with nothing seen, in the all-reduce of the ranks that still have batches."""

    def __init__(self, synchronizer: ObserverSynchronizer) -> None:
        self.synchronizer = synchronizer

    def main_hook(self) -> None:
        self.synchronizer.begin_forward(None)
        self.synchronizer.end_forward(None, None)


def discard_statistics(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a prepared model."""
    if not is_recomputing():
        synchronizer: ObserverSynchronizer = module.observer_synchronizer  # type: ignore[assignment]
        unshard_nodes(synchronizer.layers)
        run_after_fsdp(module, commit_statistics)
        synchronizer.begin_forward(module)


def commit_statistics(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a prepared model."""
    if not is_recomputing():
        synchronizer: ObserverSynchronizer = module.observer_synchronizer  # type: ignore[assignment]
        if not kernels.is_traced() and synchronizer.sets_sharded_parameters:
            reshard(module, synchronizer.layers)
        run_before_fsdp(module, remember_shards)
        synchronizer.end_forward(module, output)


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
