"""Residual networks (He et al. 2016, arXiv:1512.03385): ResNet-20 for CIFAR, ResNet-18 and ResNet-50."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    expansion = 1

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


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, the last of which widens, beside the identity or a 1x1 convolution.

    The 3x3 convolution has the stride, as in torchvision ("version 1.5").
    """

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, a global average and a linear head.

    Args:
        widths: channels of each stage, which a stage of bottlenecks widens at its end; every stage but the first halves
            the image.
        blocks: the number of blocks in each stage.
        classes: length of the result, (N, classes).
        small_images: a 3x3 stem for images of about 32x32, in place of the 7x7 one with stride 2 and max-pooling.
        block: what the stages are made of.
    """

    def __init__(
        self,
        widths: list[int],
        blocks: list[int],
        classes: int,
        small_images: bool,
        block: type[BasicBlock | Bottleneck] = BasicBlock,
    ) -> None:
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
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.Sequential()
            outputs = width * block.expansion
            for index in range(count):
                stage.append(block(channels, outputs, stride=2 if number > 0 and index == 0 else 1))
                channels = outputs
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
    return ResNet([width, 2 * width, 4 * width], [3] * 3, classes, small_images=True)


def resnet18(width: int = 64, classes: int = 1000, small_images: bool = False) -> ResNet:
    """Four stages of two blocks, ``width`` to eight times ``width`` channels; 11.7 M parameters for 1000 classes."""
    return ResNet([width, 2 * width, 4 * width, 8 * width], [2] * 4, classes, small_images)


def resnet50(width: int = 64, classes: int = 1000, small_images: bool = False) -> ResNet:
    """Four stages of 3, 4, 6 and 3 bottlenecks, 4 to 32 times ``width`` channels; 25.6 M parameters."""
    return ResNet([width, 2 * width, 4 * width, 8 * width], [3, 4, 6, 3], classes, small_images, Bottleneck)
