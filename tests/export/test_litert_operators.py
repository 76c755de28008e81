"""Operators of a LiteRT file against PyTorch's, on floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.quantization import NotExportableError
from mlframework.quantization.export.litert.flat_model import FlatModel
from mlframework.quantization.export.litert.program_file import file_of

interpreters = pytest.importorskip("ai_edge_litert.interpreter")


def ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


IMAGE = (2, 3, 6, 8)
WEIGHT = ramp(4, 3, 3, 3)
SQUARE = ramp(6, 6)
TRANSPOSED = SQUARE.mT
SLOPES = torch.tensor([0.1, -0.2, 0.3])

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: F.conv2d(x, WEIGHT, padding=1),
    "convolution without bias, strided": lambda x: F.conv2d(x, WEIGHT, stride=2, padding=1),
    "transposed convolution": lambda x: F.conv_transpose2d(x, WEIGHT.transpose(0, 1), stride=2),
    "linear over the last axis": lambda x: F.linear(x, ramp(5, 8), torch.ones(5)),
    "linear over channels": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(2, 3)),
    "batch norm": lambda x: F.batch_norm(x, SLOPES, SLOPES.abs(), SLOPES, SLOPES),
    "layer norm": lambda x: F.layer_norm(x, (6, 8), eps=1e-5),
    "layer norm of channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,), SLOPES, SLOPES),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax of the last axis": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(min=0.25),
    "leaky relu": lambda x: F.leaky_relu(x, 0.3),
    "prelu of channels": lambda x: F.prelu(x, SLOPES),
    "prelu": lambda x: F.prelu(x, SLOPES[:1]),
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "exp and log": lambda x: (x.exp() + 1).log(),
    "roots": lambda x: (x.abs() + 1).sqrt() - (x.abs() + 1).rsqrt(),
    "power": lambda x: x.abs() ** 1.5,
    "sine and cosine": lambda x: x.sin() - x.cos(),
    "numbers": lambda x: 2 - x / 3 + 1,
    "a factor of a sum": lambda x: torch.add(x, x * x, alpha=0.5),
    "broadcasting": lambda x: x * SLOPES.reshape(3, 1, 1) + x.mean(1, keepdim=True),
    "broadcasting of fewer axes": lambda x: x + x.mean((0, 1)),
    "maximum": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "mean": lambda x: x.mean((2, 3)),
    "sum of channels": lambda x: F.conv2d(x, WEIGHT).sum(1),
    "largest": lambda x: x.amax(1) - x.amin(1),
    "max pooling": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max pooling to the end": lambda x: F.max_pool2d(x[..., :5, :5], 2, ceil_mode=True),
    "average pooling": lambda x: F.avg_pool2d(x, 2),
    "average pooling with edges": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "global average": lambda x: F.adaptive_avg_pool2d(x, 1),
    "max pooling of lines": lambda x: F.max_pool1d(x[0], 3, 2, padding=1),
    "edges cut off": lambda x: F.pad(x, (-1, 2, 1, -2)),
    "pooling without a batch": lambda x: F.max_pool2d(F.avg_pool2d(x[0], 2, 1, 1), 3, 2, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear from corner to corner": lambda x: F.interpolate(x, (9, 11), mode="bilinear", align_corners=True),
    "views": lambda x: F.conv2d(x, WEIGHT).flatten(1).unflatten(1, (4, -1)).unsqueeze(2).squeeze(0),
    "permutations": lambda x: F.conv2d(x, WEIGHT).permute(3, 1, 0, 2).transpose(0, 2),
    "two orders of one tensor": lambda x: (
        (y := F.conv2d(x[..., :6], WEIGHT, padding=1)).flatten(1) - y.transpose(2, 3).flatten(1)
    ),
    "lengths for channels": lambda x: F.conv1d(F.conv1d(x[:, 0], ramp(8, 6, 1)).mT, ramp(4, 8, 3)),
    "lengths read as channels": lambda x: F.conv1d(F.conv1d(x[:, 0], ramp(4, 6, 1)).mT.reshape(2, 4, 8), ramp(4, 4, 3)),
    "a constant and its transpose": lambda x: x[..., :6] @ SQUARE - x[..., :6] @ TRANSPOSED,
    "a number of float64": lambda x: x * torch.tensor(2.0, dtype=torch.float64),
    "integers": lambda x: ((x * 4).long() * 2 + 1).sum(1).float(),
    "integers and numbers": lambda x: (x * 4).int() * 0.5,
    "rows of a computed table": lambda x: F.embedding(torch.tensor([2, 0]), x[0, 0].T),
    "concatenation of two orders": lambda x: torch.cat([F.conv2d(x, WEIGHT, padding=1), x * 2], 1),
    "concatenation with nothing": lambda x: torch.cat([torch.zeros(0), x, x * 2], 1),
    "stack": lambda x: torch.stack([x, x + 1], 2),
    "slices": lambda x: x[:, 1:, ::2, -3:],
    "one index": lambda x: F.conv2d(x, WEIGHT)[:, -1],
    "chunks": lambda x: torch.sub(*x.chunk(2, 3)),
    "unbound": lambda x: x.unbind(1)[2],
    "padding": lambda x: F.pad(x, (1, 2, 0, 1)),
    "padding with a number": lambda x: F.pad(x, (1, 2), value=3.0),
    "mirrored": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "expanded": lambda x: x.mean(1, keepdim=True).expand(2, 3, 6, 8) + 1,
    "products of matrices": lambda x: x @ x.transpose(2, 3),
    "one product": lambda x: x[0, 0] @ x[0, 1].T,
    "mask": lambda x: x.masked_fill(torch.ones(6, 8).tril() == 0, 0.5),
    "attention of masked rows": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(-1)
    ),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
}


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def run(content: bytes, x: Tensor) -> Tensor:
    runner = interpreters.Interpreter(model_content=content).get_signature_runner()
    return torch.from_numpy(runner(x=x.numpy())["output_0"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_pytorchs(name: str) -> None:
    """To what two ways of summing or approximating the same float32 function differ in."""
    model, x = Function(FUNCTIONS[name]), torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    content, _ = file_of(torch.export.export(model, (x,), strict=False))
    expected = model(x)
    found = run(content, x)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6), (found - expected).abs().max()


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "random": (lambda x: x + torch.randn(8), r"aten\.randn\.default in .*no operator"),
    "mean in float64": (
        lambda x: x.mean(1, dtype=torch.float64),
        r"gives torch\.float32 .* PyTorch gives torch\.float64",
    ),
    "to float64": (lambda x: x.double(), r"_to_copy.* tensors of torch\.float64 have no form"),
    "nearest by a fraction": (
        lambda x: F.interpolate(x[..., :3], scale_factor=(2, 3.2)),
        "quotients of the sizes alone",
    ),
    "bilinear by a fraction": (
        lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
        "quotients of the sizes alone",
    ),
    "batch norm by a computed weight": (
        lambda x: F.batch_norm(x, SLOPES, SLOPES.abs(), x[0, :, 0, 0]),
        "weight and bias are to be constants",
    ),
    "nothing": (lambda x: x[:0], "its tensors have elements"),
    "indices of pooling": (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], "the first alone"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("name", REFUSED)
def test_what_it_has_no_form_of_is_named(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(NotExportableError, match=message):
        file_of(torch.export.export(Function(function), (torch.randn(IMAGE),), strict=False))


def test_constants_are_aligned_and_what_nobody_reads_is_not_there() -> None:
    model = FlatModel()
    first, second, unread = (model.tensor(name, (3,), torch.float32) for name in ("first", "second", "unread"))
    one = model.tensor("one", (1,), torch.float32, data=torch.tensor([1.5]))
    other = model.tensor("other", (1,), torch.float32, data=torch.tensor([2.5]))
    model.operator("MUL", [first, other], [unread], model.options("MulOptions"), "the product")
    model.operator("ADD", [first, one], [second], model.options("AddOptions"), "the sum")
    content = model.to_bytes({"x": first}, {"output_0": second})
    assert model.origins == ["the sum"]
    assert content.find(torch.tensor([1.5]).numpy().tobytes()) % 16 == 0
    assert content.find(torch.tensor([2.5]).numpy().tobytes()) == -1
    assert torch.equal(run(content, torch.zeros(3)), torch.full((3,), 1.5))
