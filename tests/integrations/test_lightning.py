"""QATCallback under Lightning's Trainer: what it prepares, validates, saves, resumes, logs and exports."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger

from export.exported_file import session_of
from mlframework.quantization import (
    QATConfig,
    convert,
    float_state_dict,
    parameter_groups,
    prepare,
    quantization_metrics,
)
from mlframework.quantization.integrations.lightning import QATCallback
from mlframework.quantization.qat.fake_quantize_layer import FakeQuantizeLayer

# Lightning's own: what it has to say of its workers, its defaults and of PyTorch's trees.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
NO_DATA = "has seen no data"

generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(64, 1, 8, 8, generator=generator)
LABELS = torch.randint(0, 4, (64,), generator=generator)


class Lit(pl.LightningModule):
    """A small network with batch normalization; keeps what it was validated with."""

    def __init__(self, learnable: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
        self.model = nn.Sequential(*layers)
        self.learnable = learnable
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        logits = self.model(batch[0])
        self.validated.append(logits.clone())
        self.log("loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: Any = parameter_groups(self.model) if self.learnable else self.parameters()
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def loader(batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=batch_size)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def qat(**options: Any) -> QATCallback:
    config = options.pop("config", QATConfig())
    return QATCallback(config, (IMAGES[:1],), **options)


def state_of(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_validates_in_integers_and_exports_them(tmp_path: Path) -> None:
    """The sanity check evaluates in float with one warning; the last validation computed what convert() and the file
    do, code for code."""
    module, file = Lit(), tmp_path / "model.onnx"
    float_model = copy.deepcopy(module.model)
    callback = qat(export_path=file, schedule={"observe_until": 6, "freeze_batch_norm_from": 6})
    with pytest.warns(UserWarning, match=NO_DATA) as caught:
        trainer(tmp_path, callback, num_sanity_val_steps=1).fit(module, loader(), loader(64))
    assert [NO_DATA in str(each.message) for each in caught if NO_DATA in str(each.message)] == [True]
    with torch.no_grad():
        assert torch.equal(module.validated[0], float_model.eval()(IMAGES))
        integers = convert(module.model)(IMAGES)
        assert torch.equal(module.validated[-1], integers)
    session = session_of(file.read_bytes())
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert torch.equal(torch.from_numpy(logits), integers)
    assert callback.schedule is not None
    assert callback.schedule.steps == 8
    activations = [node for node in module.modules() if isinstance(node, FakeQuantizeLayer) and node.reduces_over_ranks]
    assert not any(node.observer.enabled for node in activations)


def test_a_schedule_counts_the_steps_of_a_trainer(tmp_path: Path) -> None:
    """A second fit goes on; that of another trainer begins anew; that of a checkpoint goes on where it was saved."""
    module, seen = Lit(), []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            norm = pl_module.model[1]
            node = pl_module.model[0].output_fake_quantize
            assert callback.schedule is not None
            seen.append((callback.schedule.steps, node.observer.enabled, bool(norm._forward_pre_hooks)))

    callback = qat(schedule={"observe_until": 2, "freeze_batch_norm_from": 3})
    steps = [(0, True, False), (1, True, False), (2, False, False), *[(step, False, True) for step in range(3, 8)]]
    first = trainer(tmp_path, callback, Seen(), max_epochs=1)
    first.fit(module, loader())
    assert first.fit_loop.max_epochs == 1
    first.fit_loop.max_epochs = 2
    first.fit(module, loader())
    assert seen == steps
    first.save_checkpoint(tmp_path / "second.ckpt")
    seen.clear()
    trainer(tmp_path, callback, Seen(), max_epochs=1).fit(module, loader())
    assert seen == steps[:4]
    seen.clear()
    trainer(tmp_path, callback, Seen(), max_epochs=3).fit(module, loader(), ckpt_path=tmp_path / "second.ckpt")
    assert seen == [(step, False, True) for step in range(8, 12)]


def test_a_state_that_is_refused_leaves_the_whole_module_as_it_was() -> None:
    """Also what the module has before its model."""

    class Before(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

    module, callback = Before(), qat()
    callback.prepare(module)
    before = state_of(module)
    state = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(RuntimeError, match="for Before, of which nothing was loaded"):
        module.load_state_dict({**state, "model.0.weight_fake_quantize.scale": torch.zeros(4)})
    assert same_state(state_of(module), before)
    callback.prepare(module)
    assert len(module._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learned"])
def test_a_resumed_fit_ends_bit_for_bit_where_the_whole_one_does(learnable: bool, tmp_path: Path) -> None:
    config = QATConfig(learnable=learnable)
    schedule = {"observe_until": 3, "freeze_batch_norm_from": 5}
    whole, first, second = Lit(learnable), Lit(learnable), Lit(learnable)
    trainer(tmp_path, qat(config=config, schedule=schedule)).fit(whole, loader())
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, qat(config=config, schedule=schedule), saving, max_epochs=1).fit(first, loader())
    callback = qat(config=config, schedule=schedule)
    trainer(tmp_path, callback).fit(second, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.schedule is not None
    assert callback.schedule.steps == 8
    assert same_state(state_of(whole), state_of(second))
    assert not same_state(state_of(whole), state_of(first))


def test_checkpoints_load_into_modules_made_anew(tmp_path: Path) -> None:
    """Through a trainer with the callback; through load_from_checkpoint where the module calls the callback, or
    prepares itself; without either, the load is refused."""
    module, callback = Lit(), qat()
    fitting = trainer(tmp_path, callback, ModelCheckpoint(tmp_path, filename="best", monitor="loss"), max_epochs=1)
    fitting.fit(module, loader(), loader(64))
    best = tmp_path / "best.ckpt"

    anew = Lit()
    trainer(tmp_path, qat()).validate(anew, loader(64), ckpt_path=best, verbose=False)
    assert torch.equal(anew.validated[-1], module.validated[-1])

    class Loading(Lit):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            qat().prepare(self)

    class Prepared(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.model = prepare(self.model, QATConfig(), (IMAGES[:1],))  # type: ignore[assignment]

    for kind in (Loading, Prepared):
        loaded = kind.load_from_checkpoint(best)
        assert same_state(state_of(loaded), state_of(module))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Lit.load_from_checkpoint(best)


def test_accumulated_gradients_count_as_one_step(tmp_path: Path) -> None:
    callback = qat(schedule={"quantize_from": 3})
    fitting = trainer(tmp_path, callback, accumulate_grad_batches=2)
    fitting.fit(Lit(), loader())
    assert callback.schedule is not None
    assert callback.schedule.steps == fitting.global_step == 4
    assert callback.schedule.is_quantizing


def test_figures_go_to_the_loggers_and_change_nothing(tmp_path: Path) -> None:
    """Every third of eight steps; with and without them, training ends bit for bit alike, and no hook is left."""
    plain, logged = Lit(), Lit()
    trainer(tmp_path, qat()).fit(plain, loader())
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, qat(log_every_n_steps=3), logger=logger, log_every_n_steps=1000).fit(logged, loader())
    assert same_state(state_of(plain), state_of(logged))
    assert len(plain.model._forward_pre_hooks) == len(logged.model._forward_pre_hooks)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    tags = lines[0].split(",")
    assert set(quantization_metrics(logged.model, IMAGES[:2])) <= set(tags)
    assert [line.split(",")[tags.index("step")] for line in lines[1:]] == ["3", "6"]


def test_calls_of_a_compiled_model_are_watched_where_it_is_called(tmp_path: Path) -> None:
    """Inside of it, a compiler would not see that the hook is there."""
    module, callback, watched = Lit(), qat(log_every_n_steps=2), []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            own = len(pl_module.model._forward_pre_hooks), len(pl_module.model._orig_mod._forward_pre_hooks)
            watched.append((own[0], own[1] - inside))

    callback.prepare(module)
    inside = len(module.model._forward_pre_hooks)
    module.model = torch.compile(module.model)  # type: ignore[assignment]
    with torch.compiler.set_stance("force_eager"):
        trainer(tmp_path, callback, Seen(), max_epochs=1).fit(module, loader())
    assert watched == [(1, 0), (1, 0), (0, 0), (1, 0)]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_two_processes_agree_and_one_exports(tmp_path: Path) -> None:
    """DistributedDataParallel on halves of each batch: after it, the state of both ranks in the one module."""
    with pytest.raises(ProcessRaisedException, match=r"model must be prepared before trainer.fit starts processes"):
        trainer(tmp_path, qat(), strategy="ddp_fork", devices=2).fit(Lit(), loader())

    class Checked(Lit):
        def on_train_end(self) -> None:
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                if tensor is not self.model[1].running_mean and tensor is not self.model[1].running_var:
                    gathered = self.all_gather(tensor.detach().float())
                    assert torch.equal(gathered[0], gathered[1])

    module, file = Checked(), tmp_path / "model.onnx"
    callback = qat(export_path=file)
    callback.prepare(module)
    trainer(tmp_path, callback, strategy="ddp_fork", devices=2, max_epochs=1).fit(module, loader(8))
    with torch.no_grad():
        integers = convert(module.model)(IMAGES)
    session = session_of(file.read_bytes())
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert torch.equal(torch.from_numpy(logits), integers)


def test_an_interrupted_fit_leaves_a_model_that_works(tmp_path: Path) -> None:
    class Failing(Lit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            if self.global_step == 2:
                raise RuntimeError("out of disk")
            return loss

    module, file = Failing(), tmp_path / "model.onnx"
    hooks = len(prepare(Lit().model, QATConfig(), (IMAGES[:1],))._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="out of disk"):
        trainer(tmp_path, qat(log_every_n_steps=1, export_path=file)).fit(module, loader())
    assert not file.exists()
    assert len(module.model._forward_pre_hooks) == hooks
    with torch.no_grad():
        assert torch.equal(convert(module.model)(IMAGES), module.model.eval()(IMAGES))


def test_scales_that_no_optimizer_trains_are_warned_of(tmp_path: Path) -> None:
    class Left(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            float_parameters = float_state_dict(self.model).keys()
            named = dict(self.model.named_parameters())
            return torch.optim.SGD([named[name] for name in float_parameters if name in named], lr=0.1)

    for kind, message in ((Left, "no optimizer trains"), (Lit, "weight decay pulls")):
        with pytest.warns(UserWarning, match=message):
            trainer(tmp_path, qat(config=QATConfig(learnable=True)), max_steps=1).fit(kind(), loader(), loader(64))


def test_what_cannot_be_prepared_is_refused_by_name(tmp_path: Path) -> None:
    class Aliased(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = self.model[0]

    aliased = Aliased()
    model = aliased.model
    with pytest.raises(ValueError, match=r"model must hold all .* got encoder"):
        qat().prepare(aliased)
    assert aliased.model is model
    with pytest.raises(AttributeError, match=r"attribute must name a module .* got 'network'"):
        qat(attribute="network").prepare(Lit())
    compiled = Lit()
    compiled.model = torch.compile(compiled.model)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"prepared before torch.compile"):
        qat().prepare(compiled)
    with pytest.raises(ValueError, match="log_every_n_steps must be"):
        qat(log_every_n_steps=0)
    with pytest.raises(ValueError, match="observe_until must be after"):
        qat(schedule={"observe_until": 0})
    with pytest.raises(TypeError, match="schedule must be a mapping"):
        qat(schedule=100)


def test_a_fit_in_evaluation_mode_is_refused(tmp_path: Path) -> None:
    """Lightning leaves modes as they are; observers of a model in evaluation mode would never see data."""
    module = Lit()
    module.model.eval()
    with pytest.raises(ValueError, match=r"model must be in training mode, or calibrated, .* got 0.output_fake_quant"):
        trainer(tmp_path, qat()).fit(module, loader(), loader(64))


def test_another_call_than_the_examples_is_refused(tmp_path: Path) -> None:
    """A call that would run the model's own code, without the nodes of activations, is refused before any step."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 4)

        def forward(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
            hidden = images.flatten(1) if shift is None else images.flatten(1) + shift
            return self.linear(hidden)  # type: ignore[no-any-return]

    class Shifting(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.model = Shifted()  # type: ignore[assignment]

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0], shift=batch[0].flatten(1)), batch[1])

    with pytest.raises(TypeError, match=r"must be called in training as in the example .* \(Tensor, shift\)"):
        trainer(tmp_path, qat()).fit(Shifting(), loader())


def test_the_other_package_of_lightning(tmp_path: Path) -> None:
    """``lightning.pytorch`` has classes of its own; its trainer takes the callback as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")

    class Other(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Lit().model

        training_step = Lit.training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, callback = Other(), qat()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(callbacks=[callback], accelerator="cpu", max_steps=2, enable_model_summary=False, **options).fit(
        module, loader()
    )
    assert callback.schedule is not None
    assert callback.schedule.steps == 2
