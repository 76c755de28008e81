"""``recommended_recipe``: how to train a network of a kind at so many bits."""

from __future__ import annotations

from torch import nn

from ..qat.config import QATConfig
from ..qat.histogram_observer import HistogramObserver
from .network_traits import network_traits
from .recipe import Recipe

# The averages of an OscillationFreezer span 100 steps: with fewer than a few of these they have counted little.
_STEPS_THAT_SHOW_OSCILLATIONS = 300
_LR_AT_8_BITS = 2e-5
_OBSERVED_WITH_DEPTHWISE = 0.7  # of the steps
_SCALE_LR_AT_FEW_BITS = 1e-3
_VECTOR_LR_FACTOR = 10.0  # of weights of few bits


def recommended_recipe(bits: int | tuple[int, int], steps: int, network: nn.Module) -> Recipe:
    """Settings for :func:`prepare`, :func:`calibrate` and :func:`finetune`, with the reasons.

    What was measured is on scikit-learn's digits with the network of ``examples/digits.py`` (five seeds), on
    EfficientNet-Lite0 with ImageNet weights (agreement with float / signal-to-noise ratio of the logits, on 96 to 320
    crops of photographs), on MiniLM with a classifier of sentences and on the face detector of MTCNN; one run each of
    the latter three, so that differences of less than .05 mean nothing.

    - Batch normalization keeps the statistics that the network came with: those of a few hundred crops are others, and
      re-estimating them took post-training W8A8 from .76 / 13 dB to .17 / 1.8 dB. The student computes without dropout
      and stochastic depth.
    - Weights of fewer than 8 bits are rounded by :func:`round_weights` first. How many batches they are rounded on can
      matter more than training: W4A8 of EfficientNet-Lite0 .01 / -2 dB to .52 / 7.7 dB on 64 crops, and to
      .83 / 11.0 dB on 512; of MiniLM 15.4 to 17.8 dB. So are 8-bit weights of other networks than transformers:
      .82 / 14 dB to .92 / 22 dB, and the face detector of MTCNN from 19.0 to 19.9 dB.
    - Outputs are compared by their squared error, and so are those of the blocks: after 60 steps at W4A8 .10 / 0.4 dB
      by the divergence of the softmax alone, .19 / 3.0 dB by the squared error, .23 / 3.9 dB with the blocks (without
      rounding first).
    - Observed ranges stay those of calibration: the moving averages of extremes, in their place, took the face detector
      of MTCNN at W8A8 from 19.9 to 18.5 dB in 150 steps, which bring 20.1 with the ranges kept. With depthwise
      convolutions they follow for the first 70 % of the steps: EfficientNet-Lite0 .95 / 23.5 dB after 60 steps, for
      .93 / 22.7 with the ranges kept.
    - AdamW's rate is 2e-5 at 8 bits: 24 steps at 1e-4 lost 2.5 dB, 60 at 5e-5 ended at as many dB (23.5) and less
      agreement (.925 for .947). Below 8 bits the training itself tells it (:class:`.Recipe`): what the networks bear
      differs more than tenfold, and does not follow from how far they are from the teacher. At ten times the rate that
      suits the face detector of MTCNN (1e-4; at 3e-4 its error grows after a quarter of the steps), the denoiser came
      from 25.9 to 28.1 dB, the character GPT from 29.3 to 29.9, the digits at W2A2 from 12.9 to 14.3. Where it is too
      much, weights start over at a tenth of it and all else at a third: the face detector comes from 12.4 to 13.0 dB,
      and to 12.7 with all at a third. Weights are what it cannot bear: with none of them trained it comes to 12.7 dB,
      for 12.1; the denoiser to 26.6, for 28.4 (from other roundings than the figures before). Averages of the last
      30 % of the steps, in the place of the last, changed nothing (12.09 dB, for 12.13).
    - Below 8 bits scales are learned, from where the squared error is least: digits at W2A2 98.00 +- 0.15 %, 97.66
      with observed scales of weights, 96.48 +- 0.26 with activations that start from their extremes. They move by a
      ten-thousandth of themselves a step: by a thousandth, 120 steps of W4A8 took the character GPT from 28.6 to 26.6
      dB, by a ten-thousandth to 29.3; the denoiser came from 22.2 to 24.6, and to 26.0 dB; the face detector of MTCNN
      from 11.5 to 12.2, and to 12.5. With activations of four bits or fewer by a thousandth: W4A4 brought the denoiser
      to 20.3 dB, and to 19.6 by a ten-thousandth (means of three runs of 40 seconds).
    - With weights of few bits, biases and normalization learn ten times as fast as the weights. A step of 3e-4 moves
      few weights of 4 bits to another integer, and these make up for what the integers cannot: 100 steps of W4A8 bring
      .74 / 9.8 dB, and .71 / 9.3 dB at one rate for all (320 crops); the face detector of MTCNN 12.5 dB, and 12.1;
      MiniLM 17.5 dB, and 17.4.
    - With 4 bits or fewer in the weights of depthwise convolutions, weights that oscillate are frozen, if there are
      steps enough to tell. This is Nagel et al. (2022).

    Args:
        bits: of weights and activations, or of each: (weights, activations).
        steps: how many the training will take.
        network: the float model. Its modules tell what kind it is; nothing is run.

    Returns:
        The recipe. ``str()`` of it gives the reasons that apply to this network.

    Raises:
        ValueError: bits out of range, or ``steps`` not positive.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        >>> recipe = recommended_recipe((4, 8), steps=1000, network=network)
        >>> recipe.config.weight_bits, recipe.config.learnable, recipe.freeze_oscillations
        (4, True, True)
        >>> print(recommended_recipe(8, steps=1000, network=nn.Linear(3, 3)))
        8 bits: scales of weights follow them, at a learning rate of 2e-05
        ranges of activations stay those of calibration
        weights of other layers than a transformer's: rounded so that outputs change little, before training
    """
    weight_bits, activation_bits = (bits, bits) if isinstance(bits, int) else bits
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    traits = network_traits(network)
    learns = min(weight_bits, activation_bits) < 8
    lr = None if learns else _LR_AT_8_BITS
    follows = traits.is_depthwise and not learns
    reasons = []
    if learns:
        config = QATConfig(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            learnable=True,
            activation_observer=HistogramObserver,
        )
        reasons.append("fewer than 8 bits: scales are learned, from the least squared error")
    else:
        config = QATConfig(weight_bits=weight_bits, activation_bits=activation_bits)
        reasons.append(f"8 bits: scales of weights follow them, at a learning rate of {lr}")
        how = "follow at first, as depthwise convolutions have it" if follows else "stay those of calibration"
        reasons.append(f"ranges of activations {how}")
    quantization_lr = _SCALE_LR_AT_FEW_BITS if activation_bits <= 4 else Recipe.quantization_lr
    if learns:
        reasons.append(
            f"activations of {activation_bits} bits: a step moves scales by {quantization_lr:g} of themselves"
        )
    vector_lr_factor = _VECTOR_LR_FACTOR if weight_bits < 8 else 1.0
    if weight_bits < 8:
        reasons.append(f"biases and normalization learn {vector_lr_factor:g} times as fast as weights of few bits")
    rounds = weight_bits < 8 or not traits.is_transformer
    if rounds:
        kind = "of few bits" if weight_bits < 8 else "of other layers than a transformer's"
        reasons.append(f"weights {kind}: rounded so that outputs change little, before training")
    if traits.has_batch_norm:
        reasons.append("batch normalization: keeps the statistics that the network came with")
    if traits.blocks:
        reasons.append(f"{len(traits.blocks)} blocks: their outputs are compared with the teacher's, too")
    freezes = traits.is_depthwise and weight_bits <= 4 and steps >= _STEPS_THAT_SHOW_OSCILLATIONS
    if freezes:
        reasons.append("depthwise convolutions of few bits: weights that oscillate are frozen")
    return Recipe(
        config=config,
        calibration=("round_weights",) if rounds else (),
        lr=lr,
        vector_lr_factor=vector_lr_factor,
        quantization_lr=quantization_lr,
        observe_until=_OBSERVED_WITH_DEPTHWISE if follows else 0.0,
        features=traits.blocks,
        freeze_oscillations=freezes,
        reasons=tuple(reasons),
    )
