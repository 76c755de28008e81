"""What DistributedDataParallel offers beside the plain loop, on two gloo processes; four under torchrun's agent."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scale import size_of
from mlframework.quantization import QATConfig, prepare
from mlframework.quantization.qat.averaged_parameters import INITIAL_SCALE
from ranks import RANKS, Branching, agree, process_group, reductions, run_ranks

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


def _model(learnable: bool = False, checkpointed: bool = False) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4))
    prepared = prepare(model, QATConfig(learnable=learnable), (torch.randn(1, 12),))
    if checkpointed:
        for index in (0, 2):
            prepared[index] = checkpoint_wrapper(prepared[index])
    return prepared


def _batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # The second half of each batch spans three times the range of the first.
    scale = torch.cat([torch.ones(8, 1), 3 * torch.ones(8, 1)])
    return [torch.randn(16, 12, generator=generator) * scale for _ in range(count)]


def _mine(batches: list[Tensor], rank: int) -> list[Tensor]:
    return [batch.chunk(dist.get_world_size())[rank] for batch in batches]


def _train(model: nn.Module, batches: list[Tensor], micro_batches: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index, batch in enumerate(batches):
        is_last = index % micro_batches == micro_batches - 1
        waits = nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with waits:
            model(batch).square().mean().backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


def _state(model: nn.Module) -> State:
    state = {name: value.detach().clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    assert all(value.isfinite().all() for name, value in state.items() if name.endswith("scale"))
    return state


def _assert_close(state: State, expected: State) -> None:
    """The mean of the gradients of two halves is summed in another order than that of the whole."""
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)


def _accumulates(rank: int, alone: dict[str, State]) -> None:
    """``no_sync``: a forward each reduces statistics; gradients wait."""
    parallel = DistributedDataParallel(_model())
    with reductions() as sizes:
        _train(parallel, _mine(_batches(), rank), micro_batches=2)
    assert len(sizes) == len(_batches())
    assert agree(_state(parallel.module))
    _assert_close(_state(parallel.module), alone["accumulates"])


def _has_a_static_graph(rank: int, alone: dict[str, State]) -> None:
    """``static_graph=True``, and with it activation checkpointing, is the plain loop to the last bit."""
    for learnable in (False, True):
        states = {}
        for options in ({}, {"static_graph": True}, {"static_graph": True, "checkpointed": True}):
            parallel = DistributedDataParallel(
                _model(learnable, options.get("checkpointed", False)), static_graph=options.get("static_graph", False)
            )
            _train(parallel, _mine(_batches(), rank))
            state = _state(parallel.module)
            assert agree(state)
            states[str(options)] = {
                name.replace("_checkpoint_wrapped_module.", ""): value for name, value in state.items()
            }
        plain, *others = states.values()
        assert plain["input_1_fake_quantize.scale"] != INITIAL_SCALE
        assert all(torch.equal(value, other[name]) for other in others for name, value in plain.items())


def _leaves_parameters_unused(rank: int, alone: dict[str, State]) -> None:
    """``find_unused_parameters=True``: a layer that no rank reaches in the first batch is set by the second."""
    torch.manual_seed(0)
    model = prepare(Branching(), QATConfig(learnable=True), (torch.randn(1, 12),))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
    positive, negative = torch.ones(4, 12), -torch.ones(4, 12)
    for mine in ((negative, negative), (positive, negative), (negative, positive), (negative, negative)):
        parallel(mine[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert agree(_state(model))
        is_reached = mine[0] is not mine[1] or model.second.input_fake_quantize.is_initialized
        assert model.second.input_fake_quantize.is_initialized == is_reached


def _joins(rank: int, alone: dict[str, State]) -> None:
    """A rank that has run out of data takes part with nothing seen; what the others show counts."""
    halves = _mine(_batches(), rank)
    for learnable in (False, True):
        parallel = DistributedDataParallel(_model(learnable))
        batches = halves[:2] if rank == 0 else halves
        # The gradients are the mean over the ranks that have a batch.
        joinables = [parallel, parallel.module.observer_synchronizer]
        with Join(joinables, divide_by_initial_world_size=False):
            _train(parallel, batches)
        assert agree(_state(parallel.module))
        if not learnable:
            _assert_close(_state(parallel.module), alone["joins"])
        parallel(halves[0]).sum().backward()  # and goes on
    # Nothing is to be reduced any more: the model alone will do.
    with Join([parallel]):
        _train(parallel, batches)
    for joinables in (
        [observed := DistributedDataParallel(_model())],
        [observed.module.observer_synchronizer, observed],
    ):
        with pytest.raises(RuntimeError, match=r"list them behind the model, Join\(\[parallel, "), Join(joinables):
            observed(halves[0])
    inside = DistributedDataParallel(nn.Sequential(_model()))
    with pytest.raises(RuntimeError, match="of just what"), Join([inside, inside.module[0].observer_synchronizer]):
        inside(halves[0])


def _hooks_on_communication(rank: int, alone: dict[str, State]) -> None:
    """An all-reduce that a hook starts when another one has ended is in the order of all ranks."""

    def twice(state, bucket):  # type: ignore[no-untyped-def]  # DistributedDataParallel knows no names of types
        def again(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            (total,) = dist.all_reduce(done.value()[0], async_op=True).get_future().wait()
            return total.div_(dist.get_world_size() ** 2)  # type: ignore[no-any-return]

        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(again)

    parallel = DistributedDataParallel(_model())
    parallel.register_comm_hook(None, twice)
    _train(parallel, _mine(_batches(), rank))
    assert agree(_state(parallel.module))
    _assert_close(_state(parallel.module), alone["plain"])


def _lands_without_backward(rank: int, alone: dict[str, State]) -> None:
    """Statistics land with the next forward where no backward has come, and at once where none can."""
    mine = _mine(_batches(), rank)
    for deferred in (True, False):
        parallel = DistributedDataParallel(_model())
        with nullcontext() if deferred else torch.no_grad():
            parallel(mine[0])
        assert parallel.module.input_1_fake_quantize.is_initialized != deferred
        if rank == 0:  # one rank may evaluate alone
            with torch.no_grad():
                parallel.module.eval()(mine[0])
            parallel.train()
        with torch.no_grad():
            parallel(mine[1])
        assert agree(_state(parallel.module))
        _assert_close(_state(parallel.module), alone["two forwards"])


def _resumes(rank: int, alone: dict[str, State]) -> None:
    """From a checkpoint that the first rank alone has loaded, as from one that all have."""
    for learnable in (False, True):
        ends = []
        for loads in (rank == 0, True):
            model = _model(learnable)
            if loads:
                model.load_state_dict(alone[f"checkpoint, {learnable}"], strict=False)
            parallel = DistributedDataParallel(model)
            same_for_all = model.eval()(_batches()[0])
            assert agree({"output": same_for_all})
            parallel.train()
            _train(parallel, _mine(_batches(), rank))
            assert agree(_state(model))
            ends.append({**_state(model), "output": same_for_all})
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def _sends_what_is_computed(rank: int, alone: dict[str, State]) -> None:
    """The formulae of docs/scale.md."""
    for learnable in (False, True):
        model = _model(learnable)
        size = size_of(model)
        assert size.buffers(learnable) == sum(each.numel() * each.element_size() for each in model.buffers())
        buckets: list[int] = []

        def noting(state, bucket, buckets=buckets):  # type: ignore[no-untyped-def]
            buckets.append(bucket.buffer().numel() * bucket.buffer().element_size())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(None, noting)
        for is_first in (True, False):
            buckets.clear()
            with reductions() as sizes:
                parallel(_mine(_batches(), rank)[0]).sum().backward()
            assert sizes == ([size.statistics] if is_first or not learnable else [])
            assert sum(buckets) == size.gradients + (size.learned if learnable else 0)


def _shards(rank: int, alone: dict[str, State]) -> None:
    """``fully_shard`` on so many ranks that some have no part of a scale."""
    parallel = DistributedDataParallel(_model(learnable=True))
    _train(parallel, _mine(_batches(), rank))
    sharded: nn.Module = fully_shard(_model(learnable=True), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    _train(sharded, _mine(_batches(), rank))
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        _assert_close(state, _state(parallel.module))


Check = Callable[[int, dict[str, State]], None]

CHECKS: list[Check] = [
    _accumulates,
    _has_a_static_graph,
    _leaves_parameters_unused,
    _joins,
    _hooks_on_communication,
    _lands_without_backward,
    _resumes,
    _sends_what_is_computed,
]
CHECKS_ON_MORE_RANKS: list[Check] = [_accumulates, _hooks_on_communication, _sends_what_is_computed, _shards]


def _alone() -> dict[str, State]:
    """What one process makes of whole batches."""
    states = {}
    model = _model()
    _train(model, _batches(), micro_batches=2)
    states["accumulates"] = _state(model)
    model = _model()
    _train(model, _batches()[:2] + [batch.chunk(RANKS)[1] for batch in _batches()[2:]])
    states["joins"] = _state(model)
    model = _model()
    _train(model, _batches())
    states["plain"] = _state(model)
    model = _model()
    with torch.no_grad():
        model(_batches()[0]), model(_batches()[1])
    states["two forwards"] = _state(model)
    for learnable in (False, True):
        model = _model(learnable)
        _train(model, _batches(8)[4:])
        states[f"checkpoint, {learnable}"] = model.state_dict()
    return states


def _worker(rank: int, folder: str) -> None:
    alone = _alone()
    with process_group(rank, folder):
        for check in CHECKS:
            check(rank, alone)
    _is_left_alone(rank, folder)


def _is_left_alone(rank: int, folder: str) -> None:
    """A rank that never comes is a time-out which names the layers."""
    store = f"file://{folder}/again"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=3))
    model = _model()
    if rank == 0:
        with pytest.raises(
            RuntimeError, match=r"statistics of 3 observers, from 0\.output_fake_quantize to 3_fake_quantize, "
        ):
            model(_batches()[0])
    dist.destroy_process_group()


def test_data_parallel_training(tmp_path: Path) -> None:
    run_ranks(_worker, str(tmp_path))


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """The handlers of signals are as before afterwards: torchrun's agent, meant to own its process, sets some."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_kept")
def test_four_ranks_under_the_agent_of_torchrun(tmp_path: Path) -> None:
    """Which sets the environment of each rank; they are forked from a process that has imported everything."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=4,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(str(tmp_path)),
    )
    assert elastic_launch(config, _ranks_that_agree)() == dict.fromkeys(range(4), 4)


def _ranks_that_agree() -> int:
    """What ``torchrun`` starts."""
    torch.set_num_threads(1)
    alone = _alone()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for check in CHECKS_ON_MORE_RANKS:
        check(dist.get_rank(), alone)
    dist.barrier()
    ranks = dist.get_world_size()
    dist.destroy_process_group()
    return ranks
