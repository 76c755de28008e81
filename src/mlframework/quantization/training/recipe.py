"""What a training that recovers accuracy consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..qat.config import QATConfig


@dataclass(frozen=True)
class Recipe:
    """How to quantize a network and train it, for :func:`finetune`; ``dataclasses.replace`` changes what it says.

    Args:
        config: for :func:`prepare`.
        calibration: names of the methods for :func:`calibrate`, in their order; none for ranges alone.
        lr: AdamW's learning rate, at the end of the warm-up. None lets the training tell: it begins at ``5e-3`` times
            the square root of the first batches' distance from the teacher (:func:`.distillation_loss`, and that of the
            features), at most 1e-3, and where it diverges, starts over with the steps that are left: weights at a tenth
            of the rate, all else at a third; at the end the state nearest to the teacher is kept. With a loss of the
            user's beside the teacher, ``5e-4`` times that root, and neither happens. 2e-5 without a teacher, or without
            a calibration.
        vector_lr_factor: by which the learning rate of biases, normalization and other parameters of one axis is larger
            (``vector_learning_rate`` of :func:`parameter_groups`).
        quantization_lr: of learned scales and zero points, relative to each (:func:`parameter_groups`).
        weight_decay: of all but scales and zero points.
        warmup: the share of the steps in which the learning rates rise in a line; they fall along a cosine after.
        max_gradient_norm: gradients are scaled down to this norm; None leaves them.
        observe_until: the share of the steps in which observed ranges of activations follow what is trained on. 0 keeps
            those of calibration, and where a node has none, the first batch that reaches it sets its range.
        batch_norm: ``"frozen"`` normalizes by the running statistics that the network came with, and leaves them;
            ``"batch"`` by those of each batch, and re-estimates the running statistics at the end.
        temperature: of the outputs' softmax (:func:`.distillation_loss`); None for outputs that are not logits.
        features: modules whose outputs are compared with the teacher's, too (:class:`.FeatureMatching`).
        feature_weight: the factor of that comparison.
        dampening: the factor of :func:`.dampening_loss` at the last step; it grows from 0 along a cosine.
        freeze_oscillations: whether oscillating weights are frozen (:class:`.OscillationFreezer`).
        reasons: why, in sentences.

    Raises:
        ValueError: a number is out of range, or ``batch_norm`` is neither.

    Example:
        >>> Recipe(lr=1e-3).batch_norm
        'frozen'
    """

    config: QATConfig = field(default_factory=QATConfig)
    calibration: tuple[str, ...] = ()
    lr: float | None = None
    vector_lr_factor: float = 1.0
    quantization_lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.1
    max_gradient_norm: float | None = 1.0
    observe_until: float = 0.0
    batch_norm: str = "frozen"
    temperature: float | None = None
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    dampening: float = 0.0
    freeze_oscillations: bool = False
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "vector_lr_factor", "quantization_lr", "max_gradient_norm", "temperature"):
            value = getattr(self, name)
            if not (value is None and name in ("lr", "max_gradient_norm", "temperature")) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        for name in ("weight_decay", "dampening", "feature_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("warmup", "observe_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, got {getattr(self, name)!r}")
        if self.batch_norm not in ("frozen", "batch"):
            raise ValueError(f"batch_norm must be 'frozen' or 'batch', got {self.batch_norm!r}")

    def __str__(self) -> str:
        return "\n".join(self.reasons)
