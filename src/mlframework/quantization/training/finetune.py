"""``finetune``: a training loop for who has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import read_checkpoint, write_checkpoint
from .recipe import Recipe
from .teacher import require_own_parameters
from .training_loop import Loss, TrainingLoop


@dataclass(frozen=True)
class History:
    """What a training went through.

    Attributes:
        losses: of every step, without dampening; also of those before the training started over.
        learning_rates: of every step, of the weights.
        oscillating: by layer, the share of the weights that oscillate at the end; empty where the recipe does not
            freeze oscillating weights, and nothing counted them.
        frozen: by layer, the share that was frozen.
    """

    losses: list[float]
    learning_rates: list[float]
    oscillating: dict[str, float] = field(default_factory=dict)
    frozen: dict[str, float] = field(default_factory=dict)


def finetune(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float | None = None,
    recipe: Recipe | None = None,
    loss: Loss | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> History:
    """Trains a prepared model to compute what its teacher computes, in place.

    AdamW with the groups of :func:`parameter_groups`, a warm-up and a cosine, clipped gradients, and the schedule of
    the recipe. With a teacher no labels are needed, and the model computes as in evaluation, without dropout and
    stochastic depth: they would be noise that the teacher does not have. A learned zero point of few bits jumps to
    another integer only where that brings the model nearer to the teacher.

    Where a teacher alone tells a calibrated model what to compute, and the recipe gives no learning rate, a training
    that diverges starts over at a lower one. The model then ends no further from the teacher than it began, on the
    first eight batches: it is put back to where it was nearer (but with ``batch_norm="batch"``, where the statistics
    are estimated after that).

    Args:
        model: from :func:`prepare`, and calibrated; otherwise the first batch sets the scales, and learned ones of
            activations stay there, which a warning says.
        teacher: the float model, with parameters of its own (``copy.deepcopy(model)`` before ``prepare``); it computes
            in evaluation mode. None to train by ``loss`` alone, in training mode.
        batches: as for :func:`calibrate`; with ``loss``, pairs of such a batch and what ``loss`` compares with. Gone
            through as often as the steps take.
        steps: how many optimizer steps.
        lr: in the place of the recipe's.
        recipe: everything else (:class:`Recipe`); the defaults where not given.
        loss: of the model's outputs and the second of a pair; added to the distance from the teacher.
        checkpoint: a file. An interruption (Ctrl-C), which waits for the end of the step at hand, saves there what it
            takes to go on, which the same call does when the file exists; it is removed at the end. ``batches`` then
            start from the beginning, and as many as were trained on are skipped. With a list, or a loader that shuffles
            by a seed, training goes on as if it had not been interrupted; a loader that shuffles anew skips other
            batches than it trained on. A generator must be a new one.
        progress: shows a bar, through rich.

    Returns:
        The losses, and how many weights oscillate where the recipe counts them.

    Raises:
        ValueError: the teacher shares Parameters with the model, there is neither teacher nor loss, ``steps`` is not
            positive, ``batches`` end too soon, or can be gone through only once where running statistics are
            re-estimated from them at the end (``batch_norm="batch"``); no module of ``recipe.features`` is called; or
            ``checkpoint`` exists and is cut off, or of another model or recipe (nothing has changed then).
        TypeError: a batch does not fit the model's forward.
        ImportError: ``progress`` without rich.
        KeyboardInterrupt: when interrupted; the model is as the last step, or what follows on it, left it, and usable.

    Warns:
        UserWarning: the first batch reaches only some of ``recipe.features``; the others are left out.

    Example:
        >>> float_model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [torch.randn(16, 4) for _ in range(4)]
        >>> teacher = copy.deepcopy(float_model)
        >>> model = prepare(float_model, QATConfig(weight_bits=4), (batches[0],))
        >>> calibrate(model, batches)
        >>> history = finetune(model, teacher, batches, steps=20, lr=1e-3)
        >>> len(history.losses)
        20
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    if teacher is None and loss is None:
        raise ValueError("teacher and loss must not both be None: there would be nothing to learn from")
    if teacher is not None:
        require_own_parameters(teacher, model)
    recipe = Recipe() if recipe is None else recipe
    recipe = recipe if lr is None else replace(recipe, lr=lr)
    loop = TrainingLoop(model, teacher, loss, recipe, steps)
    loop.require_batches(batches)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        state = read_checkpoint(path)
        try:
            loop.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"checkpoint {str(path)!r} must be of this training, give another path or remove the file to start "
                f"anew: {error}"
            ) from error
    try:
        loop.run(batches, progress)
    except KeyboardInterrupt:
        if path is not None:
            write_checkpoint(loop.state_dict(), path)
        raise
    if path is not None:
        path.unlink(missing_ok=True)
    return History(
        torch.stack(loop.losses).tolist(),
        loop.learning_rates,
        {} if loop.freezer is None else loop.freezer.oscillating(),
        {} if loop.freezer is None else loop.freezer.frozen(),
    )
