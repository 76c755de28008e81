"""Lightning: a callback that prepares, schedules, logs and exports."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..conversion.convert import unwrapped
from ..export.export_onnx import export_onnx
from ..preparation.prepare import prepare
from ..qat.config import QATConfig
from ..qat.schedule import QATSchedule
from ..state_check import check_state, has_check
from .training_run import (
    TrainingRun,
    checked_schedule,
    checked_steps,
    is_prepared,
    require_data_to_come,
    warn_of_scales,
)

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
elif "lightning.pytorch" in sys.modules:  # of which pytorch_lightning is the other name, with classes of its own
    from lightning.pytorch import Callback
else:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            f"QATCallback needs Lightning ({error}): pip install 'mlframework-quantization[lightning]'"
        ) from error


class QATCallback(Callback):
    """Quantization-aware training in a Lightning ``Trainer``, of the model that a ``LightningModule`` holds.

    Before the optimizers are made, :func:`prepare` takes the model's place: ``configure_optimizers``, the steps and
    the checkpoints are those of the prepared model, and validation, testing and prediction compute its integers. With
    a model that is prepared already, the callback does the rest.

    Checkpoints resume bit for bit: ``trainer.fit(module, ckpt_path=...)`` with a module made anew. A module whose
    ``on_load_checkpoint`` calls :meth:`prepare` is one that ``load_from_checkpoint`` loads.

    With a strategy that starts processes from this one (``"ddp_spawn"``, ``"ddp_fork"``, notebooks), call
    :meth:`prepare` before ``trainer.fit``.

    Args:
        config, example_inputs, example_kwargs: those of :func:`prepare`.
        attribute: where the module has the model, made in its ``__init__``; with dots, of an attribute's attribute.
        schedule: keyword arguments of :class:`QATSchedule`: when observers freeze, and batch normalization. Counted in
            batches after which an optimizer has stepped, of a trainer: a second ``fit`` of the same one goes on, with a
            trainer made anew the schedule begins anew, as its ``global_step`` does.
        export_path: an ONNX file, written as the fit ends, of the model that it ends with (:func:`export_onnx`); not
            after an error. The best one instead: ``trainer.validate(ckpt_path="best")`` loads it, then export.
        log_every_n_steps: every so many steps, :func:`quantization_metrics` of a batch go to the trainer's loggers.

    Raises:
        TypeError: an argument is not of its type; or the training calls the model in another way than the example does.
        ValueError: ``schedule`` is impossible, or ``log_every_n_steps`` is not positive; in ``trainer.fit``: the model
            was to be prepared before, or is in evaluation mode, where it sees no data.
        AttributeError: in ``trainer.fit``: the module has no such attribute.

    Warns:
        UserWarning: no optimizer trains the learned scales, or weight decay pulls them to zero.

    Example:
        >>> import pytorch_lightning as pl
        >>> class Lit(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = nn.Linear(4, 2)
        ...     def training_step(self, batch, index):
        ...         return self.model(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = QATCallback(QATConfig(), (torch.randn(1, 4),), schedule={"observe_until": 100})
        >>> module = Lit()
        >>> callback.prepare(module)  # as pl.Trainer(callbacks=[callback]).fit(module, ...) does
        >>> type(module.model).__name__
        'QATModuleWrapper'
    """

    def __init__(
        self,
        config: QATConfig | None = None,
        example_inputs: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        attribute: str = "model",
        schedule: Mapping[str, Any] | None = None,
        export_path: str | os.PathLike[str] | None = None,
        log_every_n_steps: int | None = None,
    ) -> None:
        self._config = config
        self._example_inputs = example_inputs
        self._example_kwargs = example_kwargs
        self._attribute = attribute
        self._schedule = checked_schedule(schedule)
        self._export_path = export_path
        self._log_every_n_steps = checked_steps(log_every_n_steps)
        self._run: TrainingRun | None = None
        self._steps_before_batch = 0

    @property
    def schedule(self) -> QATSchedule | None:
        """What switches the model's nodes, once there is a model."""
        return None if self._run is None else self._run.schedule

    def prepare(self, module: LightningModule) -> None:
        """Puts the prepared model in the place of the module's own, unless it is there already, and has the module load
        a state whole or not at all (:func:`check_state`).

        Raises:
            AttributeError: the module has no such attribute, or it is no module.
            ValueError: the model is compiled; another attribute holds a part of it, which would stay float; or what
                :func:`prepare` raises.
            TypeError: what :func:`prepare` raises.
        """
        model = self._model_of(module)
        if not has_check(module):
            module.register_load_state_dict_pre_hook(check_state)  # type: ignore[no-untyped-call]
        if is_prepared(unwrapped(model)):
            return
        if unwrapped(model) is not model:
            raise ValueError(f"{self._attribute} must be prepared before torch.compile, got a compiled model")
        parts = set(model.modules())
        prepared = prepare(model, self._config, self._example_inputs, self._example_kwargs)
        own = f"{self._attribute}."
        for name, part in module.named_modules(remove_duplicate=False):
            if part in parts and name != self._attribute and not name.startswith(own):
                raise ValueError(
                    f"{self._attribute} must hold all that the module calls of it, got {name}, which is a part of it "
                    "and would stay float: call it through the one attribute"
                )
        module.set_submodule(self._attribute, prepared)

    def _require_prepared_in_main_process(self, module: LightningModule) -> None:
        if not is_prepared(unwrapped(self._model_of(module))):
            raise ValueError(
                f"{self._attribute} must be prepared before trainer.fit starts processes, whose trained state comes "
                "back into the module of this one: callback.prepare(module), then trainer.fit(module)"
            )

    def _model_of(self, module: LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self._attribute)
        except AttributeError as error:
            raise AttributeError(
                f"attribute must name a module that {type(module).__name__} makes in its __init__, got "
                f"{self._attribute!r}: {error}"
            ) from None

    # --- what Lightning calls -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
            self._require_prepared_in_main_process(pl_module)
        self.prepare(pl_module)
        called = self._model_of(pl_module)
        model = unwrapped(called)
        if stage != "fit":
            return
        if self._run is None or self._run.model is not model:
            self._run = TrainingRun(model, self._schedule, self._log_every_n_steps)
        elif trainer.global_step == 0:  # the fit of another trainer; of a checkpoint, the state comes after this
            self._run.schedule.load_state_dict({"steps": 0})
        self._run.called = called

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        warn_of_scales(self._running.model, groups)
        require_data_to_come(self._running.model)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._steps_before_batch = trainer.global_step
        self._running.before_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps_before_batch:  # gradients accumulate
            self._running.stop_watching()
            return
        metrics = self._running.after_step()
        if metrics is not None:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._run is not None:
            self._run.stop_watching()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._export_path is not None and trainer.is_global_zero:
            model = self._running.model
            export_onnx(model, self._example_inputs, self._export_path, example_kwargs=self._example_kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._run is None else {"schedule": self._run.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._run is not None and "schedule" in state_dict:
            self._run.schedule.load_state_dict(state_dict["schedule"])

    @property
    def _running(self) -> TrainingRun:
        assert self._run is not None  # which setup() has made
        return self._run
