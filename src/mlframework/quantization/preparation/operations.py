"""What the operations of a graph do to quantized values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graph.mode_differences import TrainingOnly
from .identities import returns_its_input

# Whose code reads the weights of its layers without calling them, so that no node inside it would ever be reached.
OPAQUE_MODULES = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.AdaptiveLogSoftmaxWithLoss,
)

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PRESERVING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
# Selections and movements that PyTorch has for floats, or for few integers: max pooling of uint8 fails on images of
# more than 255 pixels.
_SELECTING_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.UpsamplingNearest2d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
)
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_SELECTING_FUNCTIONS: set[Any] = {
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    F.channel_shuffle,
}
_MIXING_CHANNELS: set[Any] = {F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle}
_NEAREST = ("nearest", "nearest-exact")
_PRESERVING_FUNCTIONS: set[Any] = {
    operator.getitem,
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.squeeze,
    torch.unsqueeze,
    torch.chunk,
    torch.split,
    torch.clone,
    torch.unbind,
    torch.narrow,
    torch.select,
    torch.flip,
    torch.roll,
    torch.movedim,
    torch.swapaxes,
    torch.tile,
}
_DIVIDING: set[Any] = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
_PRESERVING_METHODS: set[Any] = {
    "flatten",
    "reshape",
    "view",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "chunk",
    "split",
    "contiguous",
    "clone",
    "expand",
    "unflatten",
    "unbind",
    "narrow",
    "select",
    "flip",
    "roll",
    "movedim",
    "swapaxes",
    "tile",
    "repeat",
}

_NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus)
_NON_NEGATIVE_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.sigmoid,
    F.hardsigmoid,
    F.softmax,
    F.softplus,
    abs,
    torch.abs,
    torch.exp,
    torch.square,
    torch.relu,
    torch.sigmoid,
    torch.softmax,
}

_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_CLAMPS = {torch.clamp, torch.clip, "clamp", "clip", "clamp_", "clip_"}


class Patched(nn.Module):
    """Stands, where operations are recognized, for a module whose forward was replaced on the instance: what that
    computes, its class does not tell."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)

    @property
    def patched(self) -> nn.Module:
        """The module itself."""
        return self.__dict__["_module"][0]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"][0], name)


def recognizable(root: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, for recognizing by their classes what they compute."""
    return {name: Patched(module) if is_patched(module) else module for name, module in root.named_modules()}


def is_patched(module: nn.Module) -> bool:
    """Whether a module computes something else than its class does."""
    return any(name in vars(module) for name in ("forward", "_conv_forward"))


def is_call_of(
    node: fx.Node, modules: Mapping[str, nn.Module], types: tuple[type[nn.Module], ...], targets: set[Any]
) -> bool:
    """Whether a node calls a module of these types, or one of these functions or (by name) methods."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], types)
    return node.op in ("call_function", "call_method") and node.target in targets


def preserves_values(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node only moves or selects values of its first argument, so that they stay on their grid."""
    if node.op == "call_module" and getattr(modules[str(node.target)], "return_indices", False):
        return False  # its value is no tensor
    if node.op == "call_module" and is_dropout(modules[str(node.target)]):
        return True
    return is_selection(node, modules) or is_call_of(
        node, modules, _PRESERVING_MODULES, _PRESERVING_FUNCTIONS | _PRESERVING_METHODS
    )


def is_dropout(module: nn.Module) -> bool:
    """Whether the module is the identity in evaluation, and something else in training."""
    return isinstance(module, (*DROPOUTS, TrainingOnly)) or returns_its_input(module)


def keeps_channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node preserves values (or is a ReLU) and leaves each in its channel, along axis 1: what multiplies a
    channel by a positive number may stand before or after it."""
    if node.op == "call_module" and getattr(modules[str(node.target)], "return_indices", False):
        return False
    if node.op == "call_module" and is_dropout(modules[str(node.target)]):
        return True
    if node.op == "call_function" and node.target is F.pad:
        padding, dimensions = _argument(node, 1, "pad", ()), len(node.meta["tensor"].shape)
        return is_selection(node, modules) and len(padding) <= 2 * (dimensions - 2)
    if is_call_of(node, modules, (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), _MIXING_CHANNELS):
        return False
    return is_selection(node, modules) or is_relu(node, modules)


def is_division(node: fx.Node) -> bool:
    """Whether the node preserves values as a tuple of several tensors."""
    return node.op in ("call_function", "call_method") and node.target in _DIVIDING


def takes_a_part(node: fx.Node) -> bool:
    """Whether the node preserves some of the values and leaves others out."""
    targets = {operator.getitem, torch.narrow, torch.select, "narrow", "select"}
    return is_division(node) or (node.op in ("call_function", "call_method") and node.target in targets)


def is_selection(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node preserves values (zeros that it pads with are on every grid) through a kernel for floats."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Upsample):
            return module.mode in _NEAREST
        if isinstance(module, _CONSTANT_PADS) and module.value == 0:
            return True
    if node.op == "call_function" and node.target is F.interpolate:
        return _argument(node, 3, "mode", "nearest") in _NEAREST
    if node.op == "call_function" and node.target is F.pad:
        return _argument(node, 2, "mode", "constant") != "constant" or not _argument(node, 3, "value", None)
    return is_call_of(node, modules, _SELECTING_MODULES, _SELECTING_FUNCTIONS)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_never_negative(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node's values are never negative."""
    targets = {*_NON_NEGATIVE_FUNCTIONS, *_RELUS, "abs", "exp", "sigmoid", "softmax", "square"}
    return is_call_of(node, modules, _NON_NEGATIVE_MODULES, targets)


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node is a ReLU, which leaves values on their grid."""
    return is_call_of(node, modules, (nn.ReLU,), _RELUS)


def clipping_module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The activation of a node that only clips, as a module; None for anything else.

    A module made here is in evaluation mode, which is all the same to it and in no one's way.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        return module if type(module) in (nn.ReLU, nn.ReLU6, nn.Hardtanh) else None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _RELUS:
        return nn.ReLU().eval()
    if node.target is F.relu6:
        return nn.ReLU6().eval()
    if node.target in _CLAMPS or node.target is F.hardtanh:
        ends = [*node.args[1:], *(node.kwargs.get(name) for name in ("min", "max", "min_val", "max_val"))]
        numbers = [end for end in ends if isinstance(end, (int, float))]
        if len(numbers) == 2 and numbers[0] <= 0 <= numbers[1] and numbers[0] < numbers[1]:
            return nn.Hardtanh(float(numbers[0]), float(numbers[1])).eval()
    return None


def is_float_tensor(node: fx.Node) -> bool:
    """Whether the node's value was a floating-point tensor when the example ran."""
    info = node.meta.get("tensor")
    return info is not None and info.dtype.is_floating_point
