"""Pretrained networks with data to calibrate, train and test on: ``study(name)``.

>>> network = study("efficientnet")
>>> network.evaluate(network.model())["top-1 agreement"]
1.0
"""

from __future__ import annotations

from .crepe import CrepeTiny
from .denoiser import PhotographDenoiser
from .efficientnet import EfficientNetLite0
from .handwritten_digits import Digits
from .minilm import MiniLM
from .mtcnn import PNet
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study
from .text_model import CharacterGPT

__all__ = ["SIGNAL_TO_NOISE", "STUDIES", "Batch", "Inputs", "Study", "study"]

STUDIES: dict[str, type[Study]] = {
    kind.name: kind for kind in (EfficientNetLite0, CrepeTiny, PNet, MiniLM, CharacterGPT, PhotographDenoiser, Digits)
}


def study(name: str, seed: int = 0) -> Study:
    """The network of that name with its data.

    Raises:
        ValueError: there is no such network.
    """
    if name not in STUDIES:
        raise ValueError(f"name must be one of {', '.join(STUDIES)}, got {name!r}")
    return STUDIES[name](seed)
