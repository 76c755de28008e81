"""Starting over where a training diverges, for a lower learning rate, and ending no worse than it began."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..qat.observer_synchronizer import mean_over_ranks
from .checkpoint import require_fields, require_optimizer_state
from .oscillation import OscillationFreezer, require_freezer_state

# Of the mean loss of a window over the least before it.
_GROWTH_THAT_DIVERGES = 1.5


class BackingOff:
    """Keeps the state of a model and its optimizer, and goes back to it where the loss has grown.

    Losses are compared by their means over windows of a sixteenth of the steps, of 4 to 32 steps. What is kept is the
    state before the first step, for what diverges has done harm before it shows; in the second half of the steps, when
    more would be lost than that, the state of the least loss. What goes wrong in the last window, or little by little,
    shows at the end, when the states are compared on the same batches: there are up to three of them in memory then.

    Args:
        model: what is trained.
        optimizer: of it.
        freezer: what counts and freezes its weights, where something does.
        steps: of the whole training.

    Attributes:
        window: how many steps are compared.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, freezer: OscillationFreezer | None, steps: int
    ) -> None:
        self.window = min(max(steps // 16, 4), 32)
        self._model = model
        self._optimizer = optimizer
        self._freezer = freezer
        self._steps = steps
        self._least = math.inf
        self._start = self._kept = self._snapshot()

    def begin(self, loss: float) -> None:
        """Tells the loss before the first step, a mean over batches."""
        self._least = self._kept["loss"] = loss

    def goes_back(self, losses: list[Tensor]) -> bool:
        """Looks at the last window where one is full; on all ranks alike.

        Args:
            losses: of every step so far, scalars.

        Returns:
            Whether the model and the optimizer are as they were again.
        """
        if len(losses) % self.window:
            return False
        mean = mean_over_ranks(torch.stack(losses[-self.window :]).mean()).item()
        if not mean <= _GROWTH_THAT_DIVERGES * self._least:  # or not a number
            self._restore(len(losses))
            return True
        if mean < self._least:
            self._least = mean
            if 2 * len(losses) > self._steps:
                self._kept = self._snapshot()
        return False

    def end(self, loss: Callable[[], float]) -> None:
        """Leaves model and freezer as they were at their best, of the end, what is kept, and the start; on all ranks
        alike.

        Args:
            loss: of the model as it is; the same batches for each.
        """
        least, best = math.inf, self._start  # where no loss is a number
        earlier = [self._start] if self._kept is self._start else [self._kept, self._start]
        for state in (self._snapshot(), *earlier):
            self._put(state["tensors"])
            found = loss()
            if found < least:
                least, best = found, state
        self._put(best["tensors"])
        if self._freezer is not None:
            self._freezer.load_state_dict(copy.deepcopy(best["freezer"]))

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _snapshot(self) -> dict[str, Any]:
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        freezer = None if self._freezer is None else self._freezer.state_dict()
        return {
            "loss": self._least,
            "tensors": tensors,
            **copy.deepcopy({"optimizer": self._optimizer.state_dict(), "freezer": freezer}),
        }

    def _restore(self, steps_taken: int) -> None:
        self._least = self._kept["loss"]
        self._put(self._kept["tensors"])
        self._optimizer.load_state_dict(copy.deepcopy(self._kept["optimizer"]))
        if self._freezer is not None:
            self._freezer.load_state_dict({**copy.deepcopy(self._kept["freezer"]), "steps_taken": steps_taken})

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on from."""
        return {"least": self._least, "start": self._start, "kept": self._kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state, which :meth:`require_fitting` lets pass."""
        self._least, self._start, self._kept = (state_dict[name] for name in ("least", "start", "kept"))

    def require_fitting(self, state: Any) -> None:
        """Refuses the state of another training.

        Raises:
            ValueError: fields are missing, losses are not numbers, or tensors are those of another model.
        """
        require_fields(state, self.state_dict(), "backing_off")
        _require_number("least", state["least"])
        for name in ("start", "kept"):
            self._require_snapshot(name, state[name])

    def _require_snapshot(self, which: str, state: Any) -> None:
        require_fields(state, self._start, f"backing_off's {which} state")
        _require_number("loss", state["loss"])
        require_fields(state["tensors"], self._start["tensors"], "backing_off's tensors")
        require_optimizer_state(self._optimizer, state["optimizer"])
        if self._freezer is not None:
            require_freezer_state(self._freezer, state["freezer"])
        for name, own in self._start["tensors"].items():
            saved = state["tensors"][name]
            if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
                got = (tuple(saved.shape), saved.dtype) if isinstance(saved, Tensor) else saved
                raise ValueError(f"backing_off's {name} must be of {tuple(own.shape)} and {own.dtype}, got {got}")


def _require_number(name: str, loss: Any) -> None:
    if not isinstance(loss, float) or math.isnan(loss):
        raise ValueError(f"backing_off's {name} must be a float, got {loss!r}")
