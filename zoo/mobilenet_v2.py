"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): depthwise convolutions, ReLU6, linear bottlenecks."""

from __future__ import annotations

from torch import Tensor, nn

# Expansion, channels, blocks, stride of the first block: table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def multiple_of_eight(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not more than a tenth below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch normalization, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expands by a 1x1 convolution, filters each channel by itself, projects back without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential()
        if expansion != 1:
            self.layers.append(convolution(inputs, hidden, 1))
        self.layers.append(convolution(hidden, hidden, 3, stride, groups=hidden))
        self.layers.append(nn.Conv2d(hidden, outputs, 1, bias=False))
        self.layers.append(nn.BatchNorm2d(outputs))
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds_input else self.layers(x)


class MobileNetV2(nn.Module):
    """The network of table 2; 3.5 M parameters for 1000 classes, 2.2 M without the head.

    Args:
        width: multiplies the channels of every layer.
        classes: length of the result, (N, classes).
        stages: expansion, channels, blocks and stride of each stage.
        small_images: strides 1 in the stem and the second stage, for images of about 32x32.
    """

    def __init__(
        self,
        width: float = 1.0,
        classes: int = 1000,
        stages: tuple[tuple[int, int, int, int], ...] = STAGES,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        channels = multiple_of_eight(32 * width)
        self.features = nn.Sequential(convolution(3, channels, 3, stride=1 if small_images else 2))
        for number, (expansion, base, blocks, stride) in enumerate(stages):
            outputs = multiple_of_eight(base * width)
            for block in range(blocks):
                halves = block == 0 and not (small_images and number == 1)
                self.features.append(InvertedResidual(channels, outputs, stride if halves else 1, expansion))
                channels = outputs
        last = multiple_of_eight(1280 * max(1.0, width))
        self.features.append(convolution(channels, last, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
