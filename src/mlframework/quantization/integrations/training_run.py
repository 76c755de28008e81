"""A prepared model while a trainer trains it: what the callbacks of all trainers do alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import kernels
from ..analysis.calls import Call
from ..conversion.convert import unwrapped
from ..graph.example_run import copies
from ..graph.generated_forward import runs_graph
from ..preparation.parameter_groups import quantization_parameters
from ..preparation.report import PreparationReport
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.observer_synchronizer import ObserverSynchronizer
from ..qat.schedule import QATSchedule
from .quantization_metrics import metrics_of_call


class TrainingRun:
    """The schedule of a prepared model, the figures of every so many steps, and whether the trainer calls the model as
    its example did.

    Args:
        model: from :func:`prepare`.
        schedule: keyword arguments of :class:`QATSchedule`.
        log_every_n_steps: steps between figures; None for none.

    Attributes:
        called: what the training calls: the model, or what ``torch.compile`` made of it.
    """

    def __init__(self, model: nn.Module, schedule: Mapping[str, Any], log_every_n_steps: int | None) -> None:
        self.model = model
        self.called = model
        self.schedule = QATSchedule(model, **schedule)
        self._log_every_n_steps = log_every_n_steps
        self._knows_calls = False
        self._watching: RemovableHandle | None = None
        self._call: Call | None = None
        self._has_warned = False

    def before_batch(self) -> None:
        """Watches the model's calls for one batch: in the first step, and where figures are due after this one."""
        self.stop_watching()
        if self._is_due or not self._knows_calls:
            self._watching = self.called.register_forward_pre_hook(self._watch, with_kwargs=True)

    def after_step(self) -> dict[str, float] | None:
        """Counts an optimizer step. Returns the figures, where they are due, on the first call since
        :meth:`before_batch`; of scales alone, with a warning, where a compiler lets nobody see the call."""
        call, is_due = self._call, self._is_due
        self.stop_watching()
        if is_due and call is None:
            self._warn_if_compiled()
        self.schedule.step()
        return metrics_of_call(self.model, call) if is_due else None

    def stop_watching(self) -> None:
        """Takes the hook off, and forgets the call."""
        if self._watching is not None:
            self._watching.remove()
        self._watching = self._call = None

    @property
    def _is_due(self) -> bool:
        every = self._log_every_n_steps
        return every is not None and (self.schedule.steps + 1) % every == 0

    def _warn_if_compiled(self) -> None:
        synchronizer = self.model.observer_synchronizer
        if isinstance(synchronizer, ObserverSynchronizer) and synchronizer.is_traced and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self.model).__name__} is compiled, and how it is called is not seen: of it, scales alone are "
                "logged, and no clipped_share or snr. For these, call log_quantization(model, writer, step, batch)",
                UserWarning,
                stacklevel=2,
            )

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kernels.is_traced():  # by a compiler, where nothing can be noted
            return
        if not self._knows_calls:
            require_example_call(self.model, args, kwargs)
            self._knows_calls = True
        if self._is_due and self._call is None:
            self._call = copies(args), copies(kwargs)


def is_prepared(model: nn.Module) -> bool:
    """Whether :func:`prepare` made the model."""
    return isinstance(getattr(model, "preparation_report", None), PreparationReport)


def require_prepared(model: nn.Module) -> nn.Module:
    """The prepared model, inside of what ``torch.compile`` and data parallelism put around it.

    Raises:
        ValueError: it is not prepared.
    """
    model = unwrapped(model)
    if not is_prepared(model):
        raise ValueError(
            f"model must be prepared, got {type(model).__name__}: call prepare(model, ...) first, so that the "
            "optimizer trains the prepared one"
        )
    return model


def checked_steps(log_every_n_steps: int | None) -> int | None:
    """The argument of a callback.

    Raises:
        ValueError: it is no positive number of steps.
    """
    value = log_every_n_steps
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"log_every_n_steps must be a positive number of steps or None, got {value!r}")
    return value


def checked_schedule(schedule: Mapping[str, Any] | None) -> dict[str, Any]:
    """The argument of a callback, as a dictionary.

    Raises:
        TypeError: it is no mapping, or one of other names than QATSchedule's arguments.
        ValueError: a step is none, or the order is impossible.
    """
    if schedule is not None and not isinstance(schedule, Mapping):
        raise TypeError(f"schedule must be a mapping of QATSchedule's arguments, got {type(schedule).__name__}")
    checked = dict(schedule or {})
    QATSchedule(nn.Identity(), **checked)
    return checked


def require_example_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses a call that runs the model's own code in place of what was prepared: its nodes would be left out of
    training, and of validation, which would not be of what is deployed.

    Raises:
        TypeError: a keyword or a constant differs from the example's.
    """
    if not runs_graph(model, args, kwargs):
        given = ", ".join([*(type(value).__name__ for value in args), *kwargs])
        raise TypeError(
            f"{type(model).__name__} must be called in training as in the example that it was prepared with, got a "
            f"call with ({given}): prepare it with an example of the call that will be deployed, and compute the loss "
            "of its outputs"
        )


def require_data_to_come(model: nn.Module) -> None:
    """Refuses nodes that have seen no data and are in evaluation mode, where they see none: they would train in float.

    Raises:
        ValueError: there is one.
    """
    for name, node in model.named_modules():
        if isinstance(node, FakeQuantizeLayer) and not node.training and not node.is_initialized:
            raise ValueError(
                f"model must be in training mode, or calibrated, for training with quantization, got {name or 'it'} in "
                "evaluation mode without data: call model.train() before the fit, which leaves modes as they are"
            )


def warn_of_scales(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Warns where optimizers leave learned scales out, or pull them to zero.

    Args:
        model: from :func:`prepare`.
        groups: parameter groups of all optimizers.
    """
    decays = {id(parameter): group.get("weight_decay", 0) for group in groups for parameter in group["params"]}
    learned = [id(parameter) for parameter in quantization_parameters(model)]
    if not all(parameter in decays for parameter in learned):
        fault = "no optimizer trains some of the model's learned scales"
    elif any(decays[parameter] for parameter in learned):
        fault = "weight decay pulls the model's learned scales to zero"
    else:
        return
    warnings.warn(f"{fault}: make the optimizer with parameter_groups(model, ...)", UserWarning, stacklevel=2)
