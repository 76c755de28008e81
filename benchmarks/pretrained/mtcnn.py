"""P-Net, the first network of MTCNN (Zhang et al. 2016, arXiv:1604.02878), on photographs with faces at many scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics import f1
from .package_files import folder_of, import_alone
from .pictures import Split, crops
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study

SIZE = 160
BATCH_SIZE = 8
TEST_BATCHES = 16
THRESHOLD = 0.6  # of MTCNN's first stage
FACES_A_CROP = 3

# Of scikit-image's 100 faces of the set "Labeled Faces in the Wild", 25 x 25 pixels each.
_FACES: dict[Split, range] = {"train": range(50), "calibration": range(50, 65), "test": range(65, 100)}


@cache
def _faces() -> Tensor:
    with files("skimage.data").joinpath("lfw_subset.npy").open("rb") as file:
        return torch.from_numpy(np.load(file)[:100]).float() * 255


def scenes(split: Split, count: int, generator: torch.Generator) -> Tensor:
    """Crops of photographs with some faces put in, of 12 to 40 pixels: (count, 3, 160, 160), as MTCNN scales them."""
    pictures = crops(split, count, SIZE, generator, smallest=64)
    faces = _faces()[list(_FACES[split])]
    for picture in pictures:
        for _ in range(FACES_A_CROP):
            draws = torch.rand(4, generator=generator).tolist()
            side = round(12 * (40 / 12) ** draws[0])
            row, column = (int(draw * (SIZE - side + 1)) for draw in draws[1:3])
            face = faces[int(draws[3] * len(faces))][None, None]
            face = F.interpolate(face, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
            picture[:, row : row + side, column : column + side] = face[0]
    return (pictures - 127.5) / 128


@cache
def _batches(split: Split, count: int, seed: int) -> list[Tensor]:
    return list(scenes(split, count * BATCH_SIZE, torch.Generator().manual_seed(seed)).split(BATCH_SIZE))


class PNet(Study):
    """Four small convolutions with PReLU and no batch norm; a box and a probability for every second pixel."""

    name: ClassVar = "pnet"
    title: ClassVar = "MTCNN P-Net"
    metrics: ClassVar = ("F1 of face cells", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = 3e-4
    training_seconds: ClassVar = 30
    trained_widths: ClassVar = ("W8A8", "W4A8", "W4A4")

    def model(self) -> nn.Module:
        detection = "facenet_pytorch.models.utils.detect_face"
        unused = {"detect_face": None, "extract_face": None}
        module = import_alone(
            "facenet_pytorch.models.mtcnn",
            {
                "facenet_pytorch": {},
                "facenet_pytorch.models": {},
                "facenet_pytorch.models.utils": {},
                detection: unused,
            },
        )
        model: nn.Module = module.PNet(pretrained=False)
        path = folder_of(module).parent / "data" / "pnet.pt"
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()

    def calibration_batches(self) -> list[Inputs]:
        return [(images,) for images in _batches("calibration", 4, 1)]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield Batch((scenes("train", BATCH_SIZE, generator),))

    def test_batches(self) -> list[Batch]:
        return [Batch((images,)) for images in _batches("test", TEST_BATCHES, 2)]

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        if teacher_outputs is None:
            raise ValueError("teacher_outputs must be given: the photographs have no labels")
        (boxes, faces), (teacher_boxes, teacher_faces) = outputs, teacher_outputs
        return F.binary_cross_entropy(faces, teacher_faces) + F.mse_loss(boxes, teacher_boxes)

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {"F1 of face cells": f1(_found(references), _found(outputs))}

    def logits(self, outputs: Any) -> Tensor:
        """Boxes and the probability of a face, (N, 5, H, W)."""
        boxes, faces = outputs
        return torch.cat([boxes, faces[:, 1:]], 1)


def _found(outputs: Sequence[Any]) -> list[Tensor]:
    return [faces[:, 1] > THRESHOLD for _, faces in outputs]
