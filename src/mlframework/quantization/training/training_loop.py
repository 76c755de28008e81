"""The steps of :func:`.finetune`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.modes import in_evaluation
from ..int8.folding import BATCH_NORMS
from ..preparation.batches import arguments_of, iterated
from ..preparation.parameter_groups import parameter_groups
from ..progress import progress_bar
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.observer_synchronizer import mean_over_ranks
from .distillation import FeatureMatching, distillation_loss
from .modes import in_fine_tuning
from .oscillation import OscillationFreezer, dampening_loss
from .recipe import Recipe

Loss = Callable[[Any, Any], Tensor]

# Adam's steps are as long as the learning rate, and a distance is a squared error: they are to shrink with its root.
# The factor did best, or nearly, on networks whose first distance was .04 to .4.
_LR_AT_DISTANCE_ONE = 5e-4
_LR_OTHERWISE = 2e-5

# How many batches running statistics are re-estimated from: enough for a mean to a tenth of a standard deviation.
_BATCHES_FOR_STATISTICS = 100


class TrainingLoop:
    """A training under way, with the state that a checkpoint holds.

    Args:
        model, teacher, loss, recipe, steps: those of :func:`.finetune`.

    Attributes:
        losses: of the steps taken, scalars apart from any graph.
        learning_rates: of the same steps.
        freezer: of oscillating weights, where the recipe has one.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, loss: Loss | None, recipe: Recipe, steps: int
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.loss = loss
        self.recipe = recipe
        self.steps = steps
        groups = parameter_groups(
            model,
            relative_quantization_learning_rate=recipe.quantization_lr,
            vector_learning_rate=recipe.vector_lr_factor,
            lr=1.0,
            weight_decay=recipe.weight_decay,
        )
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._pace)
        self.nodes = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
        self.freezer = OscillationFreezer(model, steps=steps) if recipe.freeze_oscillations else None
        self.losses: list[Tensor] = []
        self.learning_rates: list[float] = []
        self._knows_features = False

    @property
    def done(self) -> int:
        """How many steps have been taken."""
        return len(self.learning_rates)

    @property
    def batch_statistics(self) -> bool:
        """Whether batch normalization trains by the statistics of each batch, and is re-estimated at the end."""
        has_batch_norm = any(isinstance(module, BATCH_NORMS) for module in self.model.modules())
        return has_batch_norm and self.recipe.batch_norm == "batch"

    def require_batches(self, batches: Iterable[Any]) -> None:
        """Refuses batches that would be found not to do when much has been trained.

        Raises:
            TypeError: they are a single batch.
            ValueError: they can be gone through only once, and are needed again.
        """
        if isinstance(iterated(batches), Iterator) and self.batch_statistics:
            raise ValueError(
                "batches must be a list or a loader that starts anew, for running statistics to be re-estimated from "
                f"at the end (batch_norm='batch'), got a {type(batches).__name__}, which has ended by then"
            )

    def run(self, batches: Iterable[Any], progress: bool) -> None:
        """The steps that are left, and what follows on the last. Batches of the steps taken are skipped."""
        batch_statistics = self.batch_statistics
        with ExitStack() as stack:
            modes = {"regularizes": self.teacher is None, "batch_statistics": batch_statistics}
            stack.enter_context(in_fine_tuning(self.model, **modes))
            if self.teacher is not None:
                stack.enter_context(in_evaluation(self.teacher))
            advance = stack.enter_context(progress_bar("fine-tuning", self.steps, done=self.done, shown=progress))
            features = None
            if self.teacher is not None and self.recipe.features:
                features = stack.enter_context(FeatureMatching(self.model, self.teacher, self.recipe.features))
            for batch in islice(_repeated(batches), self.done, self.steps) if self.done < self.steps else ():
                self._hold_ranges()
                self._step(batch, features)
                advance(f"loss {self.losses[-1].item():.4g}" if progress else "")
        if batch_statistics:
            from ..calibration.batch_norm import reestimate_batch_norm

            several = [self._inputs(batch) for batch in islice(iterated(batches), _BATCHES_FOR_STATISTICS)]
            reestimate_batch_norm(self.model, several)

    def _hold_ranges(self) -> None:
        """Switches the observers of activations off when it is time, but where they have seen nothing yet."""
        if self.done >= round(self.steps * self.recipe.observe_until):
            for node in self.nodes:
                if node.is_initialized and node.reduces_over_ranks:
                    node.observer.enabled = False

    def _step(self, batch: Any, features: FeatureMatching | None) -> None:
        calibrated = all(node.is_initialized for node in self.nodes)
        distance, loss = self._losses_of(batch, features)
        if not self.done:
            self._set_learning_rate(distance, calibrated)
        total = loss
        if self.recipe.dampening:
            factor = self.recipe.dampening * 0.5 * (1 - math.cos(math.pi * self.done / self.steps))
            total = loss + factor * dampening_loss(self.model)
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if self.recipe.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_gradient_norm)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        if self.freezer is not None:
            self.freezer.step()
        self.scheduler.step()
        self.losses.append(loss.detach().float())
        self.learning_rates.append(float(rate))

    def _losses_of(self, batch: Any, features: FeatureMatching | None) -> tuple[Tensor | None, Tensor]:
        """The distance from the teacher, where there is one, and what is to be minimized."""
        args, kwargs = arguments_of(self.model, self._inputs(batch))
        outputs = self.model(*args, **kwargs)
        distance = None
        if self.teacher is not None:
            with torch.no_grad():
                expected = self.teacher(*args, **kwargs)
            distance = distillation_loss(outputs, expected, temperature=self.recipe.temperature)
        if features is not None:
            assert distance is not None
            self._leave_out_idle(features)
            distance = distance + self.recipe.feature_weight * features.loss()
        if self.loss is None:
            assert distance is not None
            return distance, distance
        task = self.loss(outputs, batch[1]).sum()
        return distance, task if distance is None else distance + task

    def _set_learning_rate(self, distance: Tensor | None, calibrated: bool) -> None:
        """Of the groups whose rates are relative to it until then: the weights', and that of vectors.

        Raises:
            ValueError: the distance is infinite or NaN.
        """
        rate = self.recipe.lr
        if rate is None and distance is not None and calibrated:
            first = mean_over_ranks(distance.detach()).item()
            if not math.isfinite(first):
                raise ValueError(f"batches must start with one whose outputs are finite, got a distance of {first}")
            rate = _LR_AT_DISTANCE_ONE * math.sqrt(min(max(first, 0.0), 1.0))
        elif rate is None:
            rate = _LR_OTHERWISE
        factors = (1.0, self.recipe.vector_lr_factor)
        for index, (group, factor) in enumerate(zip(self.optimizer.param_groups[:2], factors, strict=True)):
            group["initial_lr"] = self.scheduler.base_lrs[index] = rate * factor
            group["lr"] = rate * factor * self._pace(0)

    def _leave_out_idle(self, features: FeatureMatching) -> None:
        """Once: what a network's structure names as blocks may be what its forward never calls."""
        idle = () if self._knows_features else features.leave_out_idle()
        self._knows_features = True
        if idle:
            warnings.warn(
                f"features are compared of modules that both models call, which these are not: {', '.join(idle)}",
                UserWarning,
                stacklevel=2,
            )

    def _inputs(self, batch: Any) -> Any:
        return batch if self.loss is None else batch[0]

    def _pace(self, step: int) -> float:
        """The factor of the learning rates: a line up, then a cosine down."""
        warmup = self.steps * self.recipe.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.steps - warmup, 1)))

    def state_dict(self) -> dict[str, Any]:
        """The model, and what it takes to go on training it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "freezer": None if self.freezer is None else self.freezer.state_dict(),
            "losses": list(self.losses),
            "learning_rates": list(self.learning_rates),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state; raises what loading the model's or the optimizer's raises."""
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        if self.freezer is not None:
            self.freezer.load_state_dict(state_dict["freezer"])
        self.losses = list(state_dict["losses"])
        self.learning_rates = list(state_dict["learning_rates"])


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, over and over.

    Raises:
        ValueError: there are none, or they can be gone through only once and have ended.
    """
    count = 0
    while True:
        before = count
        for batch in batches:
            yield batch
            count += 1
        if count == before:
            raise ValueError(
                f"batches must last for all steps, or be a list or a loader that starts anew; they ended after {count}"
            )
