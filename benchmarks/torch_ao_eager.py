"""The zoo's networks as torch.ao's eager mode wants them: rewritten by hand, with the modules to fuse listed."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    QuantWrapper,
    fuse_modules_qat,
    get_default_qat_qconfig,
    prepare_qat,
)

import zoo
from zoo.mobilenet_v2 import InvertedResidual
from zoo.resnet import BasicBlock, Bottleneck


class QuantizableBasicBlock(nn.Module):
    """The residual block with a sum that is a module, and a ReLU for each place that has one."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.first = nn.Sequential(block.conv1, block.bn1, nn.ReLU())
        self.second = nn.Sequential(block.conv2, block.bn2)
        self.downsample = block.downsample
        self.sum = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.sum.add_relu(self.second(self.first(x)), identity)


class QuantizableBottleneck(nn.Module):
    """The bottleneck, likewise."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.first = nn.Sequential(block.conv1, block.bn1, nn.ReLU())
        self.second = nn.Sequential(block.conv2, block.bn2, nn.ReLU())
        self.third = nn.Sequential(block.conv3, block.bn3)
        self.downsample = block.downsample
        self.sum = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.sum.add_relu(self.third(self.second(self.first(x))), identity)


class QuantizableInvertedResidual(nn.Module):
    """The inverted residual with a sum that is a module."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.layers = block.layers
        self.sum = FloatFunctional() if block.adds_input else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y if self.sum is None else self.sum.add(x, y)


class Stubbed(nn.Module):
    """A network between the stubs where its values become quantized and float again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.quantize = QuantStub()
        self.network = network
        self.dequantize = DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dequantize(self.network(self.quantize(x))))


def prepared(model: nn.Module) -> nn.Module:
    """The model with torch.ao's fused fake quantization for x86, in training mode.

    Set up as "Eager Mode Quantization", section "Quantization Aware Training for Static Quantization" of
    https://docs.pytorch.org/docs/stable/quantization.html says, and the networks rewritten as in
    https://docs.pytorch.org/tutorials/advanced/static_quantization_tutorial.html (and torchvision's quantizable
    models): sums as ``FloatFunctional``, ReLU in place of ReLU6, for which there is no fused module. A GPT, whose
    attention eager mode has no modules for, gets its linear layers wrapped one by one.
    """
    model = copy.deepcopy(model)
    if isinstance(model, zoo.GPT):
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                layer.qconfig = get_default_qat_qconfig("x86")
                model.set_submodule(name, QuantWrapper(layer))
    else:
        model = Stubbed(_rewritten(model))
        fuse_modules_qat(model.train(), _patterns(model), inplace=True)
        model.qconfig = get_default_qat_qconfig("x86")
    return cast(nn.Module, prepare_qat(model.train(), inplace=True))


def _rewritten(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, BasicBlock):
            model.set_submodule(name, QuantizableBasicBlock(module))
        elif isinstance(module, Bottleneck):
            model.set_submodule(name, QuantizableBottleneck(module))
        elif isinstance(module, InvertedResidual):
            model.set_submodule(name, QuantizableInvertedResidual(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU6):
            model.set_submodule(name, nn.ReLU())
    return model


def _patterns(model: nn.Module) -> list[list[str]]:
    """Runs of layer, batch normalization and ReLU that eager mode has one module for."""
    patterns = []
    modules = dict(model.named_modules())
    names = list(modules)
    for start, name in enumerate(names):
        run = [name]
        kinds: tuple[type[nn.Module], ...]
        if isinstance(modules[name], nn.Conv2d):
            kinds = (nn.BatchNorm2d, nn.ReLU)
        elif isinstance(modules[name], nn.Linear):
            # There is no module of the three.
            normalized = isinstance(modules[names[start + 1]], nn.BatchNorm1d) if start + 1 < len(names) else False
            kinds = (nn.BatchNorm1d,) if normalized else (nn.ReLU,)
        else:
            continue
        for following, kind in zip(names[start + 1 :], kinds, strict=False):
            if not isinstance(modules[following], kind):
                break
            run.append(following)
        if len(run) > 1:
            patterns.append(run)
    return patterns
