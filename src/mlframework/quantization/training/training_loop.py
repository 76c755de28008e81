"""The steps of :func:`.finetune`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
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
from .backing_off import BackingOff
from .checkpoint import require_fields, require_like, require_optimizer_state
from .distillation import FeatureMatching, distillation_loss
from .interruption import interrupted_at_end
from .modes import in_fine_tuning, without_observers
from .oscillation import OscillationFreezer, dampening_loss, require_freezer_state
from .recipe import Recipe
from .zero_point_trials import ZeroPointTrials

Loss = Callable[[Any, Any], Tensor]

# Adam's steps are as long as the learning rate, and a distance is a squared error: they are to shrink with its root.
# Networks differ in what they bear by more than a factor of 10: the first training is at what the hardiest bore best,
# and where it diverges, others follow. A loss of the user's tells no divergence, and the most sensitive is the measure.
_LR_AT_DISTANCE_ONE = 5e-3
_LR_AT_DISTANCE_ONE_WITH_A_LOSS = 5e-4
_HIGHEST_LR = 1e-3
_LR_OTHERWISE = 2e-5
_BACKING_OFF = 1 / 3
_BACKING_OFF_OF_WEIGHTS = 1 / 10  # whose integers jump; what else is trained moves outputs smoothly
_FIRST_BATCHES = 8

# How many batches running statistics are re-estimated from: enough for a mean to a tenth of a standard deviation.
_BATCHES_FOR_STATISTICS = 100


class TrainingLoop:
    """A training under way, with the state that a checkpoint holds.

    Args:
        model, teacher, loss, recipe, steps: those of :func:`.finetune`.

    Attributes:
        started: after how many steps the training that goes on began, another one having diverged.
        losses: of the steps taken, scalars apart from any graph.
        learning_rates: of the same steps.
        freezer: of oscillating weights, where the recipe has one.
        backing_off: from divergence, where the first batch tells the learning rate.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, loss: Loss | None, recipe: Recipe, steps: int
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.loss = loss
        self.recipe = recipe
        self.steps = steps
        self.started = 0
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
        # Without a teacher dropout makes a loss of its own of every pass, and none is to be compared with another.
        self.trials = None if teacher is None else ZeroPointTrials(self.nodes)
        self.freezer = OscillationFreezer(model, steps=steps) if recipe.freeze_oscillations else None
        self.backing_off: BackingOff | None = None
        if recipe.lr is None and teacher is not None and loss is None:
            self.backing_off = BackingOff(model, self.optimizer, self.freezer, steps)
        self.losses: list[Tensor] = []
        self.learning_rates: list[float] = []
        self._first_batches: list[Any] = []
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
            stream = self._stream(batches)
            if not self.done:
                self._begin(features)
            for batch in stream:
                with interrupted_at_end():
                    self._hold_ranges()
                    self._step(batch, features)
                advance(f"loss {self.losses[-1].item():.4g}" if progress else "")
            # Statistics of batches are not those that the model will have, which are estimated from what it is now.
            if self.backing_off is not None and not batch_statistics:
                activations = [node for node in self.nodes if node.reduces_over_ranks]  # scales of weights follow these
                with interrupted_at_end():
                    self.backing_off.end(lambda: self._mean_distance(self._first_batches, features, activations))
        if batch_statistics:
            from ..calibration.batch_norm import reestimate_batch_norm

            several = [self._inputs(batch) for batch in islice(iterated(batches), _BATCHES_FOR_STATISTICS)]
            reestimate_batch_norm(self.model, several)

    def _stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of the steps that are left; the first of all are kept where distances on them count."""
        stream = _repeated(batches)
        if self.recipe.lr is None and self.teacher is not None and (not self.done or self.backing_off is not None):
            self._first_batches = list(islice(stream, min(_FIRST_BATCHES, self.steps)))
        if self.done == self.steps:
            return iter(())
        return islice(chain(self._first_batches, stream), self.done, self.steps)

    def _hold_ranges(self) -> None:
        """Switches the observers of activations off when it is time, but where they have seen nothing yet."""
        if self.done >= round(self.steps * self.recipe.observe_until):
            for node in self.nodes:
                if node.is_initialized and node.reduces_over_ranks:
                    node.observer.enabled = False

    def _step(self, batch: Any, features: FeatureMatching | None) -> None:
        outputs, distance = self._distance(batch, features)
        total = loss = self._loss(outputs, distance, batch)
        if self.recipe.dampening:
            factor = self.recipe.dampening * 0.5 * (1 - math.cos(math.pi * self.done / self.steps))
            total = loss + factor * dampening_loss(self.model)
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if self.recipe.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_gradient_norm)
        rate = self.optimizer.param_groups[0]["lr"]
        codes = [] if self.trials is None else self.trials.codes()
        self.optimizer.step()
        if self.freezer is not None:
            self.freezer.step()
        if self.trials is not None:
            self.trials.take_back(codes, lambda: self._mean_distance([batch], features, self.nodes))
        self.scheduler.step()
        self.losses.append(loss.detach().float())
        self.learning_rates.append(float(rate))
        if self.backing_off is not None and self.backing_off.goes_back(self.losses):
            self.started = self.done
            weights, *others = map(float, self.scheduler.base_lrs)
            self._set_learning_rates([weights * _BACKING_OFF_OF_WEIGHTS, *(rate * _BACKING_OFF for rate in others)])

    def _distance(self, batch: Any, features: FeatureMatching | None) -> tuple[Any, Tensor | None]:
        """The outputs, and their distance from the teacher's where there is one."""
        args, kwargs = arguments_of(self.model, self._inputs(batch))
        outputs = self.model(*args, **kwargs)
        if self.teacher is None:
            return outputs, None
        with torch.no_grad():
            expected = self.teacher(*args, **kwargs)
        distance = distillation_loss(outputs, expected, temperature=self.recipe.temperature)
        if features is not None:
            self._leave_out_idle(features)
            distance = distance + self.recipe.feature_weight * features.loss()
        return outputs, distance

    def _loss(self, outputs: Any, distance: Tensor | None, batch: Any) -> Tensor:
        """What is to be minimized."""
        if self.loss is None:
            assert distance is not None
            return distance
        task = self.loss(outputs, batch[1]).sum()
        return task if distance is None else distance + task

    def _mean_distance(
        self, batches: list[Any], features: FeatureMatching | None, nodes: list[FakeQuantizeLayer]
    ) -> float:
        """From the teacher, over the batches of all ranks; observers of the nodes do not see them."""
        with torch.no_grad(), without_observers(nodes):
            distances = [self._distance(batch, features)[1] for batch in batches]
        return mean_over_ranks(torch.stack(distances).mean()).item()  # type: ignore[arg-type]

    def _begin(self, features: FeatureMatching | None) -> None:
        """Sets the learning rates, which the distance of the first batches tells where the recipe does not.

        Raises:
            ValueError: the distance is infinite or NaN.
        """
        rate = self.recipe.lr
        if rate is None and (self.teacher is None or not all(node.is_initialized for node in self.nodes)):
            rate, self.backing_off = _LR_OTHERWISE, None
        if rate is None:
            distance = self._mean_distance(self._first_batches, features, self.nodes)
            if not math.isfinite(distance):
                raise ValueError(f"batches must start with some whose outputs are finite, got a distance of {distance}")
            factor = _LR_AT_DISTANCE_ONE_WITH_A_LOSS
            if self.backing_off is not None:
                factor = _LR_AT_DISTANCE_ONE
                self.backing_off.begin(distance)
            rate = min(factor * math.sqrt(max(distance, 0.0)), _HIGHEST_LR)
        self._set_learning_rates([rate, rate * self.recipe.vector_lr_factor, *map(float, self.scheduler.base_lrs[2:])])

    def _set_learning_rates(self, rates: list[float]) -> None:
        """Of all groups, at the full pace."""
        self.scheduler.base_lrs[:] = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * self._pace(self.done)

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
        step, steps = step - self.started, self.steps - self.started
        warmup = steps * self.recipe.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    def state_dict(self) -> dict[str, Any]:
        """The model, and what it takes to go on training it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "freezer": None if self.freezer is None else self.freezer.state_dict(),
            "backing_off": None if self.backing_off is None else self.backing_off.state_dict(),
            "started": self.started,
            "losses": list(self.losses),
            "learning_rates": list(self.learning_rates),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state; one that is refused changes nothing.

        Raises:
            ValueError: it is no such state, or of another optimizer or recipe.
            RuntimeError: it is of another model.
        """
        self._require_fitting(state_dict)
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        if self.freezer is not None:
            self.freezer.load_state_dict(state_dict["freezer"])
        if state_dict["backing_off"] is None:
            self.backing_off = None
        elif self.backing_off is not None:
            self.backing_off.load_state_dict(state_dict["backing_off"])
        self.started = state_dict["started"]
        self.losses = list(state_dict["losses"])
        self.learning_rates = list(state_dict["learning_rates"])

    def _require_fitting(self, state: Any) -> None:
        own = self.state_dict()
        require_fields(state, own, "state_dict")
        if not isinstance(state["model"], Mapping):
            raise ValueError(f"model must be a state_dict, got {type(state['model']).__name__}")
        require_optimizer_state(self.optimizer, state["optimizer"])
        require_fields(state["scheduler"], own["scheduler"], "scheduler")
        for name, value in own["scheduler"].items():
            require_like(state["scheduler"][name], value, f"scheduler's {name}")
        if self.freezer is not None:
            require_freezer_state(self.freezer, state["freezer"])
        elif state["freezer"] is not None:
            raise ValueError("freezer must be None as the recipe freezes no weights, got the state of one")
        if state["backing_off"] is not None:
            if self.backing_off is None:
                raise ValueError(
                    "backing_off must be None as the learning rate is given, got a state to start over from"
                )
            self.backing_off.require_fitting(state["backing_off"])
        losses, rates = state["losses"], state["learning_rates"]
        is_like = _are(losses, Tensor) and _are(rates, float) and len(losses) == len(rates)
        if not is_like or any(loss.dim() for loss in losses):
            raise ValueError(
                f"losses and learning_rates must be lists of a scalar tensor and a float a step, got {rates!r}"
            )
        started = state["started"]
        if isinstance(started, bool) or not isinstance(started, int) or not 0 <= started <= len(rates):
            raise ValueError(f"started must be an int between 0 and the {len(rates)} steps taken, got {started!r}")


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


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
