"""When observing, quantizing and batch-norm statistics start and stop during training."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..int8.folding import BATCH_NORMS
from .batch_norms import use_running_statistics
from .fake_quantize_layer import FakeQuantizeLayer


class QATSchedule:
    """Switches a model's nodes by the number of training steps. Call :meth:`step` after every optimizer step.

    Weights follow their observers throughout: their range is that of the weight itself, not a statistic.

    Args:
        model: a prepared model.
        observe_from: the step from which activation observers run.
        observe_until: the step at which they freeze; None is never.
        quantize_from: the step from which fake quantization is on; before, the model trains in float. Not before
            ``observe_from``, since scales come from what was observed.
        freeze_batch_norm_from: the step from which batch normalization uses its running statistics and no longer
            updates them, as evaluation does; None is never. Statistics that are updated with a momentum of 0.01 are
            those of some hundred steps ago, when weights were others: :func:`reestimate_batch_norm` after the training.

    Raises:
        ValueError: a step is negative, or the order is impossible.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(), (torch.randn(1, 4),))
        >>> schedule = QATSchedule(prepared, quantize_from=2, observe_until=100)
        >>> schedule.is_quantizing
        False
        >>> schedule.step(), schedule.step()
        (None, None)
        >>> schedule.is_quantizing
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        observe_from: int = 0,
        observe_until: int | None = None,
        quantize_from: int = 0,
        freeze_batch_norm_from: int | None = None,
    ) -> None:
        steps = {
            "observe_from": observe_from,
            "observe_until": observe_until,
            "quantize_from": quantize_from,
            "freeze_batch_norm_from": freeze_batch_norm_from,
        }
        for name, value in steps.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be a step number from 0, got {value!r}")
        if quantize_from < observe_from:
            raise ValueError(f"quantize_from must not be before observe_from={observe_from}, got {quantize_from}")
        if observe_until is not None and observe_until <= observe_from:
            raise ValueError(f"observe_until must be after observe_from={observe_from}, got {observe_until}")
        self.model = model
        self.observe_from = observe_from
        self.observe_until = observe_until
        self.quantize_from = quantize_from
        self.freeze_batch_norm_from = freeze_batch_norm_from
        self.steps = 0
        self._holds: list[RemovableHandle] = []
        self._applied: tuple[bool, bool, bool] | None = None
        self._apply()

    @property
    def is_observing(self) -> bool:
        """Whether activation observers run at this step."""
        return self.observe_from <= self.steps and (self.observe_until is None or self.steps < self.observe_until)

    @property
    def is_quantizing(self) -> bool:
        """Whether fake quantization is on at this step."""
        return self.steps >= self.quantize_from

    @property
    def freezes_batch_norm(self) -> bool:
        """Whether batch normalization uses its running statistics at this step."""
        return self.freeze_batch_norm_from is not None and self.steps >= self.freeze_batch_norm_from

    def step(self) -> None:
        """Counts one training step and switches what is due."""
        self.steps += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved number of steps.

        Raises:
            ValueError: there is none.
        """
        steps = state_dict.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state_dict must hold a number of steps from 0, got {steps!r}")
        self.steps = steps
        self._apply()

    def _apply(self) -> None:
        """Switches what changed; what somebody switched by hand in the meantime stays."""
        due = (self.is_observing, self.is_quantizing, self.freezes_batch_norm)
        if due == self._applied:
            return
        self._applied = due
        for module in self.model.modules():
            if isinstance(module, FakeQuantizeLayer):
                module.fake_quantize_enabled = self.is_quantizing
                if module.reduces_over_ranks:
                    module.observer.enabled = self.is_observing
        if self.freezes_batch_norm and not self._holds:
            # A hook and not eval(), which the next model.train() would undo.
            self._holds = [
                module.register_forward_pre_hook(use_running_statistics)
                for module in self.model.modules()
                if isinstance(module, BATCH_NORMS)
            ]
        elif not self.freezes_batch_norm:
            for hold in self._holds:
                hold.remove()
            if self._holds:
                self.model.train(self.model.training)
            self._holds = []
