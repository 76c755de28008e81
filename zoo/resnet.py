"""Residual networks of basic blocks (He et al. 2016, arXiv:1512.03385): ResNet-20 for CIFAR and ResNet-18."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """A stem, stages of basic blocks, a global average and a linear head.

    Args:
        widths: channels of each stage; every stage but the first halves the image.
        blocks: blocks in every stage.
        classes: length of the result, (N, classes).
        small_images: a 3x3 stem for images of about 32x32, in place of the 7x7 one with stride 2 and max-pooling.
    """

    def __init__(self, widths: list[int], blocks: int, classes: int, small_images: bool) -> None:
        super().__init__()
        if small_images:
            self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.Sequential()
        channels = widths[0]
        for number, width in enumerate(widths):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(BasicBlock(channels, width, stride=2 if number > 0 and block == 0 else 1))
                channels = width
            self.stages.append(stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.stages(x))
        return self.fc(torch.flatten(x, 1))


def resnet20(width: int = 16, classes: int = 10) -> ResNet:
    """Three stages of three blocks for 32x32 images, ``width`` to four times ``width`` channels; 0.27 M parameters.

    The shortcuts that change shape are 1x1 convolutions (option B of the paper, which pads with zeros for CIFAR).
    """
    return ResNet([width, 2 * width, 4 * width], blocks=3, classes=classes, small_images=True)


def resnet18(width: int = 64, classes: int = 1000, small_images: bool = False) -> ResNet:
    """Four stages of two blocks, ``width`` to eight times ``width`` channels; 11.7 M parameters for 1000 classes."""
    return ResNet([width, 2 * width, 4 * width, 8 * width], blocks=2, classes=classes, small_images=small_images)
