"""FSDP2 on two gloo processes against DistributedDataParallel on the same data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoints
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from export.exported_file import session_of
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    calibrate,
    convert,
    export_onnx,
    load_float_state_dict,
    parameter_groups,
    prepare,
)
from mlframework.quantization.qat.averaged_parameters import INITIAL_SCALE
from ranks import RANKS, Branching, process_group, run_ranks
from zoo.gpt import GPT

STEPS = 4
VOCABULARY = 20


def _model(learnable: bool, integer_forward: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, context=16, width=32, layers=2, heads=4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each rank draws its own
    config = QATConfig(learnable=learnable, integer_forward=integer_forward)
    return prepare(model, config, (torch.zeros(2, 16, dtype=torch.long),))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (8, 16), generator=generator) for _ in range(STEPS)]


def _train(model: nn.Module, batches: list[Tensor]) -> list[float]:
    """The losses of a rank's own batches."""
    optimizer = torch.optim.SGD(parameter_groups(model, quantization_learning_rate=1e-5), lr=0.05)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch).flatten(0, 1).float(), batch.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Buffers are the model's own, and change with it.
    return {name.replace("_checkpoint_wrapped_module.", ""): value.clone() for name, value in state.items()}


def _nodes(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]


def _shard_blocks(model: Any, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def _checkpointed(model: Any, **options: Any) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    _shard_blocks(model, **options)


def _shard_nodes(model: nn.Module, policy: MixedPrecisionPolicy | None = None, **options: Any) -> None:
    fully_shard(_nodes(model), **options, reshard_after_forward=False)
    _shard_blocks(model, **options, mp_policy=policy or MixedPrecisionPolicy())


def _half_precision(model: nn.Module, **options: Any) -> None:
    _shard_nodes(model, MixedPrecisionPolicy(param_dtype=torch.bfloat16), **options)


SHARDINGS: dict[str, Callable[..., Any]] = {
    "root": fully_shard,
    "blocks": _shard_blocks,
    "checkpointed": _checkpointed,
    "half precision": _half_precision,
}


def _halves(rank: int) -> list[Tensor]:
    return [batch.chunk(RANKS)[rank] for batch in _batches()]


def _worker(rank: int, folder: str, learnable: bool) -> None:
    with process_group(rank, folder):
        halves = _halves(rank)
        results: dict[str, Any] = {}
        mesh = init_device_mesh("cpu", (RANKS,))
        for integer_forward in (True, False):  # FSDP's hooks on nodes keep layers from training on codes
            model = _model(learnable, integer_forward)
            parallel = DistributedDataParallel(model)
            results[f"data parallel, {integer_forward}"] = _train(parallel, halves), _state(model)
            del parallel
        model = _model(learnable, integer_forward=False)
        _shard_nodes(model, mesh=mesh)
        results["nodes"] = _train(model, halves), _state(model)
        for name, shard in SHARDINGS.items():
            model = _model(learnable)
            shard(model, mesh=mesh)
            losses = _train(model, halves)
            with pytest.raises(RuntimeError, match="model must hold whole parameters"):
                convert(model)
            results[name] = losses, _state(model)
            if name == "blocks":
                model.eval()
                with torch.no_grad():
                    results["evaluated"] = model(_batches()[0])
                with pytest.raises(RuntimeError, match="model must hold whole parameters"):
                    convert(model)  # also where the last forward has left them gathered
                calibrate(model, [batch[:4] for batch in _batches()])
                results["calibrated"] = _state(model)
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("learnable", [pytest.param(False, marks=pytest.mark.long), True])
def test_sharded_training_is_data_parallel_training(tmp_path: Path, learnable: bool) -> None:
    run_ranks(_worker, str(tmp_path), learnable)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for losses, state in (result["data parallel, True"] for result in results):
        assert losses[-1] < losses[0]
        assert all(
            value != INITIAL_SCALE for name, value in state.items() if name.endswith("input_fake_quantize.scale")
        )
    for name in ("nodes", *SHARDINGS):
        for rank, result in enumerate(results):
            losses, state = result[name]
            expected_losses, expected = result[f"data parallel, {name != 'nodes'}"]
            exact = name != "half precision"
            # bfloat16 has eight bits, and each of the four steps starts from the rounding of the one before.
            torch.testing.assert_close(losses, expected_losses, rtol=0 if exact else 1e-2, atol=0)
            if rank > 0:
                continue  # a full state is gathered on the first rank
            assert state.keys() == expected.keys()
            for key, value in expected.items():
                if exact:
                    assert torch.equal(state[key], value), f"{name}: {key}"
                elif key.endswith("scale"):
                    assert state[key].dtype is torch.float32
                    torch.testing.assert_close(state[key], value, rtol=0.1, atol=0)
    # Learned scales that calibration has set are those of whole parameters.
    calibrated = _model(learnable)
    calibrated.load_state_dict(results[0]["blocks"][1])
    calibrate(calibrated, [batch[:4] for batch in _batches()])
    for key, value in calibrated.state_dict().items():
        assert torch.equal(results[0]["calibrated"][key], value), key
    # What is deployed is what the sharded model evaluates to.
    whole = _model(learnable)
    whole.load_state_dict(results[0]["blocks"][1])
    with torch.no_grad():
        outputs = convert(whole)(_batches()[0])
    assert all(torch.equal(result["evaluated"], outputs) for result in results)


def _uneven_worker(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        positive = torch.ones(4, 12)
        firsts = {"branch": -positive, "empty": torch.empty(0, 12)}
        states = {}
        for name, first in firsts.items():
            for sharded in (False, True):
                torch.manual_seed(0)
                model: Any = prepare(Branching(), QATConfig(learnable=True), (torch.randn(1, 12),))
                if sharded:
                    parallel: Any = fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
                    parallel.set_reduce_scatter_unused_params(True)
                else:
                    parallel = DistributedDataParallel(model, find_unused_parameters=True)
                for batch in (first if rank == 0 else positive, positive):
                    parallel(batch).sum().backward()
                states[name, sharded] = _state(model)
                del parallel
        torch.save(states, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_a_rank_may_have_no_data_for_a_layer_at_first(tmp_path: Path) -> None:
    run_ranks(_uneven_worker, str(tmp_path))
    states = torch.load(tmp_path / "0.pt")
    for name in ("branch", "empty"):
        assert states[name, True]["second.input_fake_quantize.scale"].item() != INITIAL_SCALE
        for key, value in states[name, False].items():
            assert torch.equal(states[name, True][key], value), f"{name}: {key}"


def _refused_worker(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        halves = _halves(rank)
        mesh = init_device_mesh("cpu", (RANKS,))
        half = _model(learnable=True)
        fully_shard(half, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(
            RuntimeError, match=r"the learned scale of token.weight_fake_quantize must be float32, got .*16"
        ):
            half(halves[0])
        inner = _model(learnable=True)
        around = nn.Sequential(inner)
        fully_shard(around, mesh=mesh)
        with pytest.raises(RuntimeError, match="cannot be set while FSDP has gathered it, and would be lost"):
            around(halves[0])
        with pytest.raises(RuntimeError, match=r"got token\.weight split over ranks: load before fully_shard"):
            load_float_state_dict(inner, {})
        compiled = _model(learnable=True)
        fully_shard(compiled, mesh=mesh)
        with pytest.raises(RuntimeError, match="cannot be set while FSDP has gathered it, and would be lost"):
            torch.compile(compiled, backend="eager")(halves[0])
        model = _model(learnable=False)
        name = next(name for name, module in model.named_modules() if hasattr(module, "weight_fake_quantize"))
        with pytest.raises(NotImplementedError, match=r"nn\.Linear"):
            parallelize_module(model, mesh, {name: ColwiseParallel()})
        sharded = nn.Sequential(nn.Linear(4, 4))
        parallelize_module(sharded, mesh, {"0": ColwiseParallel()})
        with pytest.raises(ValueError, match=r"before its parameters are split over ranks, which 0\.weight is"):
            prepare(sharded, QATConfig(), (torch.randn(2, 4),))


@pytest.mark.slow
def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    run_ranks(_refused_worker, str(tmp_path))


def _layers(learnable: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    return prepare(model, QATConfig(learnable=learnable), (torch.randn(2, 12),))


def _rows(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 12, generator=generator).chunk(RANKS)[rank] for _ in range(STEPS)]


def _sharded(model: Any) -> Any:
    fully_shard(model[2], mesh=init_device_mesh("cpu", (RANKS,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def _steps_are_projected_after_another_forward(rank: int) -> None:
    """A forward between backward and step has FSDP put gathered parameters in the place of the optimizer's."""
    model = _sharded(_layers(learnable=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    _train_on(model, _rows(rank)[:1])  # sets the scales
    for batch in _rows(rank):
        before = _state(model)
        model(batch).square().mean().backward()
        with torch.no_grad():
            model(batch)
        optimizer.step()
        optimizer.zero_grad()
        model.reshard()  # FSDP itself computes with what it has gathered until then
        ratios = [value / before[name] for name, value in _state(model).items() if name.endswith("scale")]
        assert all(((ratio >= 0.5) & (ratio <= 2)).all() for ratio in ratios)
        assert rank > 0 or any((ratio != 1).any() for ratio in ratios)


def _weights_have_their_own_scales(rank: int) -> None:
    """Of the whole weight, channel by channel, whatever rows a rank has; in a parameter that is sharded or not."""
    for learnable in (False, True):
        model = _sharded(_layers(learnable))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for batch in _rows(rank)[:2]:
            model(batch).square().mean().backward()
            assert model[2].weight.to_local().shape == (2, 16)
            weight = model[2].weight.full_tensor().detach()
            scale = model[2].weight_fake_quantize.scale
            if learnable:
                assert scale.to_local().shape == (2,)
                assert scale.grad.full_tensor().ne(0).any()
                scale = scale.full_tensor().detach()
            # Learned ones start at the least squared error, somewhat below the extremes.
            torch.testing.assert_close(scale, weight.abs().amax(1) / 127, rtol=0.2 if learnable else 1e-6, atol=0)
            optimizer.step()


def _one_rank_loads(rank: int) -> None:
    """A whole state on the first rank, which FSDP hands out, trains as one that every rank had before sharding."""
    trained = _layers(learnable=True)
    parallel = DistributedDataParallel(trained)
    _train_on(parallel, _rows(rank))
    del parallel
    checkpoint = {name: value.clone() for name, value in trained.state_dict().items()}
    whole = _layers(learnable=True)
    whole.load_state_dict(checkpoint)
    sharded = _sharded(_layers(learnable=True))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sharded, checkpoint if rank == 0 else {}, options=options)
    parallel = DistributedDataParallel(whole)
    _train_on(parallel, _rows(rank))
    _train_on(sharded, _rows(rank))
    state = _state(sharded)
    if rank == 0:
        assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    del parallel


def _train_on(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _one_rank_deploys(rank: int, folder: str) -> None:
    """Written by all ranks, read by the first: integers as the sharded model evaluates, and a file that gives them."""
    model = _sharded(_layers(learnable=True))
    _train_on(model, _rows(rank))
    checkpoints.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/checkpoint")
    same_for_all = _rows(0)[0]
    with torch.no_grad():
        evaluated = model.eval()(same_for_all)
    if rank == 0:
        whole = _layers(learnable=True)
        state = {"model": whole.state_dict()}
        checkpoints.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
        whole.load_state_dict(state["model"])
        with torch.no_grad():
            assert torch.equal(convert(whole)(same_for_all), evaluated)
        export_onnx(whole, (same_for_all,), f"{folder}/model.onnx")
        session = session_of(Path(folder, "model.onnx").read_bytes())
        (outputs,) = session.run(None, {session.get_inputs()[0].name: same_for_all.numpy()})
        # ONNX Runtime requantizes in float32, which may end a step away; the range has 255.
        step = float(evaluated.max() - evaluated.min()) / 100
        torch.testing.assert_close(torch.from_numpy(outputs), evaluated, rtol=0, atol=step)


def _half_precision_checkpointed(rank: int) -> None:
    """Mixed precision and activation checkpointing together: learned scales stay float32, and the same everywhere."""
    model: Any = _model(learnable=True)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    _half_precision(model, mesh=init_device_mesh("cpu", (RANKS,)))
    losses = _train(model, _halves(rank))
    state = _state(model)
    again = _model(learnable=True)
    _half_precision(again, mesh=init_device_mesh("cpu", (RANKS,)))
    assert _train(again, _halves(rank)) == losses
    if rank == 0:
        assert all(value.dtype is torch.float32 for name, value in state.items() if name.endswith("scale"))
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def _compiled_steps_are_those_without_a_compiler(rank: int) -> None:
    """Where the first batch came before; where it did not is refused."""
    first, *rest = _rows(rank)
    states = []
    for compiles in (False, True):
        model = _sharded(_layers(learnable=True))
        _train_on(model, [first])
        graphs = counters["stats"]["unique_graphs"]
        _train_on(torch.compile(model, backend="aot_eager") if compiles else model, rest[:2])
        assert counters["stats"]["unique_graphs"] > graphs or not compiles
        states.append(_state(model))
    # aot_eager calls the operators that eager code calls.
    torch.testing.assert_close(*states, rtol=0, atol=0)


def _features_worker(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        _steps_are_projected_after_another_forward(rank)
        _weights_have_their_own_scales(rank)
        _one_rank_loads(rank)
        _one_rank_deploys(rank, folder)
        _half_precision_checkpointed(rank)
        _compiled_steps_are_those_without_a_compiler(rank)


@pytest.mark.slow
def test_sharded_models_are_loaded_stepped_and_deployed(tmp_path: Path) -> None:
    run_ranks(_features_worker, str(tmp_path))
