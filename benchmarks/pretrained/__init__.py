"""Pretrained networks with data to calibrate, train and test on: ``study(name)``.

>>> network = study("efficientnet")
>>> network.evaluate(network.model())["top-1 agreement"]
1.0
"""

from __future__ import annotations

from collections.abc import Callable

from .crepe import CrepeTiny
from .denoiser import PhotographDenoiser
from .efficientnet import EfficientNetLite0
from .handwritten_digits import Digits
from .minilm import MiniLM
from .mtcnn import PNet
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study
from .text_model import CharacterGPT

__all__ = ["SIGNAL_TO_NOISE", "STUDIES", "Batch", "Inputs", "Study", "study"]

# From a seed: the digits have a split and a float network for each, all others the same.
STUDIES: dict[str, Callable[[int], Study]] = {
    EfficientNetLite0.name: lambda seed: EfficientNetLite0(),
    CrepeTiny.name: lambda seed: CrepeTiny(),
    PNet.name: lambda seed: PNet(),
    MiniLM.name: lambda seed: MiniLM(),
    CharacterGPT.name: lambda seed: CharacterGPT(),
    PhotographDenoiser.name: lambda seed: PhotographDenoiser(),
    Digits.name: Digits,
}


def study(name: str, seed: int = 0) -> Study:
    """The network of that name with its data.

    Raises:
        ValueError: there is no such network.
    """
    if name not in STUDIES:
        raise ValueError(f"name must be one of {', '.join(STUDIES)}, got {name!r}")
    return STUDIES[name](seed)
