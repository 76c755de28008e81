"""Hugging Face: a callback for ``Trainer``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"QATTrainerCallback needs transformers ({error}): pip install 'mlframework-quantization[transformers]'"
    ) from error

from ..export.export_onnx import export_onnx
from ..qat.schedule import QATSchedule
from .int8_pretrained import Int8Config, Int8Quantizer
from .quantization_metrics import ScalarWriter, write_scalars
from .saved_pretrained import load_saved, loads_saved_names
from .training_run import TrainingRun, checked_schedule, checked_steps, require_prepared, warn_of_scales

__all__ = ["Int8Config", "Int8Quantizer", "QATTrainerCallback", "load_saved"]


class QATTrainerCallback(TrainerCallback):
    """Quantization-aware training in ``transformers.Trainer``, of a model that :func:`prepare` made before.

    The callback switches what the schedule says (a resumed training goes on where it was), logs, and exports the model
    that the training ends with: the best one, with ``load_best_model_at_end``.

    ``Trainer`` gives models their labels for a loss, which nobody has after deployment. Prepare with an example of the
    call that will be deployed, and let ``Trainer`` compute the loss of the outputs::

        model = prepare(model, config, example_kwargs={"pixel_values": images})
        model.accepts_loss_kwargs = False  # or Trainer calls it with num_items_in_batch
        Trainer(model, compute_loss_func=loss, callbacks=[QATTrainerCallback()], ...)

    Args:
        schedule: keyword arguments of :class:`QATSchedule`, counted in optimizer steps.
        export_path: an ONNX file, written at the end of a training (:func:`export_onnx`).
        example_inputs, example_kwargs: of the exported call.
        writer: where figures go: a ``SummaryWriter``, or whatever has its ``add_scalar``.
        log_every_n_steps: every so many steps, :func:`quantization_metrics` of a batch go to the writer.

    Raises:
        TypeError: an argument is not of its type; or the training calls the model in another way than the example does.
        ValueError: ``schedule`` is impossible, ``log_every_n_steps`` is not positive, or given without ``writer``, or
            the reverse; when the ``Trainer`` is made: its model is not prepared.

    Warns:
        UserWarning: no optimizer trains the learned scales, or weight decay (``TrainingArguments.weight_decay``) pulls
            them to zero.

    Example:
        >>> callback = QATTrainerCallback(schedule={"observe_until": 1000, "freeze_batch_norm_from": 1000})
    """

    def __init__(
        self,
        *,
        schedule: Mapping[str, Any] | None = None,
        export_path: str | os.PathLike[str] | None = None,
        example_inputs: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        writer: ScalarWriter | None = None,
        log_every_n_steps: int | None = None,
    ) -> None:
        self._schedule = checked_schedule(schedule)
        self._export_path = export_path
        self._example_inputs = example_inputs
        self._example_kwargs = example_kwargs
        self._writer = writer
        self._log_every_n_steps = checked_steps(log_every_n_steps)
        if (writer is None) != (log_every_n_steps is None):
            raise ValueError(
                f"writer and log_every_n_steps must be given together, got {writer} and {log_every_n_steps}"
            )
        self._run: TrainingRun | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loads_saved_names(require_prepared(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = require_prepared(kwargs["model"])
        loads_saved_names(model)
        warn_of_scales(model, kwargs["optimizer"].param_groups)
        if self._run is None or self._run.model is not model:
            self._run = TrainingRun(model, self._schedule, self._log_every_n_steps)
        self._run.stop_watching()  # where an error ended another training
        self._run.schedule.load_state_dict({"steps": state.global_step})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running.before_batch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = self._running.after_step()
        if metrics is not None and self._writer is not None and state.is_world_process_zero:
            write_scalars(self._writer, metrics, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running.stop_watching()
        if self._export_path is not None and state.is_world_process_zero:
            model = self._running.model
            export_onnx(model, self._example_inputs, self._export_path, example_kwargs=self._example_kwargs)

    @property
    def schedule(self) -> QATSchedule | None:
        """What switches the model's nodes, once a training has begun."""
        return None if self._run is None else self._run.schedule

    @property
    def _running(self) -> TrainingRun:
        assert self._run is not None  # which on_train_begin() has made
        return self._run
