"""Photographs that scikit-image, scikit-learn and matplotlib ship, cut into training, calibration and test regions."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Split = Literal["train", "calibration", "test"]

SKIMAGE, SKLEARN, MATPLOTLIB = "skimage.data", "sklearn.datasets.images", "matplotlib"

# A package and a file in it. Of the stereo pair of a motorcycle one side is enough; drawings and text are left out.
PHOTOGRAPHS: dict[str, tuple[str, str]] = {
    "astronaut": (SKIMAGE, "astronaut.png"),
    "brick": (SKIMAGE, "brick.png"),
    "camera": (SKIMAGE, "camera.png"),
    "chelsea": (SKIMAGE, "chelsea.png"),
    "china": (SKLEARN, "china.jpg"),
    "coffee": (SKIMAGE, "coffee.png"),
    "coins": (SKIMAGE, "coins.png"),
    "flower": (SKLEARN, "flower.jpg"),
    "grace_hopper": (MATPLOTLIB, "mpl-data/sample_data/grace_hopper.jpg"),
    "grass": (SKIMAGE, "grass.png"),
    "gravel": (SKIMAGE, "gravel.png"),
    "hubble": (SKIMAGE, "hubble_deep_field.jpg"),
    "moon": (SKIMAGE, "moon.png"),
    "motorcycle": (SKIMAGE, "motorcycle_left.png"),
    "retina": (SKIMAGE, "retina.jpg"),
    "rocket": (SKIMAGE, "rocket.jpg"),
}

# Pictures of things are cut in two, so that there is something of each to learn from and something to be tested on.
# Textures, which are nobody's class, are for training alone.
_CUT = ("astronaut", "camera", "chelsea", "coffee", "flower", "grace_hopper", "rocket")
_CALIBRATION = ("china", "coins", "grass", "motorcycle")
_TRAIN_SHARE = 0.5


@cache
def photograph(name: str) -> Tensor:
    """A picture of ``PHOTOGRAPHS``, uint8 (3, H, W)."""
    package, path = PHOTOGRAPHS[name]
    with files(package).joinpath(path).open("rb") as file, Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def pictures_of(split: Split) -> tuple[str, ...]:
    """The pictures that have a region in the split."""
    if split == "test":
        return _CUT
    if split == "calibration":
        return _CALIBRATION
    return tuple(name for name in PHOTOGRAPHS if name not in _CALIBRATION)


def bounds(name: str, split: Split) -> tuple[int, int, int]:
    """The axis along which a picture is cut (its longer one), and where the split's region begins and ends on it.

    In every second picture that is cut the region to test on comes first, so that not all tops are in one split.
    """
    shape = photograph(name).shape
    axis = 1 if shape[1] > shape[2] else 2
    if name not in _CUT:
        return axis, 0, shape[axis]
    train_first = _CUT.index(name) % 2 == 0
    edge = round(shape[axis] * (_TRAIN_SHARE if train_first else 1 - _TRAIN_SHARE))
    return (axis, 0, edge) if (split == "train") == train_first else (axis, edge, shape[axis])


def region(name: str, split: Split) -> Tensor:
    """The part of a picture that belongs to the split, uint8 (3, H, W)."""
    axis, begin, end = bounds(name, split)
    return photograph(name).narrow(axis, begin, end - begin)


def crops(split: Split, count: int, size: int, generator: torch.Generator, smallest: int) -> Tensor:
    """Square crops of random place and side, every second one mirrored, resized: (count, 3, size, size), 0 to 255.

    Args:
        split: whose regions to cut from, each picture as often as another.
        count: how many.
        size: height and width of the result.
        generator: what draws.
        smallest: the shortest side of a crop before it is resized, where the region allows that; the longest is what
            the region allows.
    """
    regions = [region(name, split) for name in pictures_of(split)]
    order = torch.cat([torch.randperm(len(regions), generator=generator) for _ in range(-(-count // len(regions)))])
    draws = torch.rand(count, 4, generator=generator)
    result = []
    for index, (side_draw, row_draw, column_draw, mirror) in zip(order.tolist(), draws.tolist(), strict=False):
        picture = regions[index]
        _, height, width = picture.shape
        longest = min(height, width)
        shortest = min(smallest, longest)
        side = round(math.exp(math.log(shortest) + side_draw * math.log(longest / shortest)))
        row, column = int(row_draw * (height - side + 1)), int(column_draw * (width - side + 1))
        crop = picture[None, :, row : row + side, column : column + side].float()
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        result.append(crop.flip(3) if mirror < 0.5 else crop)
    return torch.cat(result)
