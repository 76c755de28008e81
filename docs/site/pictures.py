"""Draws the pictures of the pages. Every number in them is computed by the library.

python docs/site/pictures.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from mlframework.quantization import (
    QATConfig,
    QuantizationParameters,
    QuantizationScheme,
    calibrate,
    convert,
    fake_quantize,
    preparation_report,
    prepare,
)

FOLDER = Path(__file__).parents[1] / "pictures"
BLUE, ORANGE, GREEN, GREY = "#3f51b5", "#e8710a", "#188038", "#9aa0a6"
PALE = {BLUE: "#e8eaf6", ORANGE: "#fdebd9", GREEN: "#e1f2e6", GREY: "#f1f3f4"}


def main() -> None:
    """All of them."""
    style = {
        "font.size": 10,
        "svg.hashsalt": "mlframework",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    torch.manual_seed(0)
    for draw in (nodes, grid, scale_gradient, scale_search, arithmetic):
        with plt.rc_context(style):
            figure = draw()
            figure.savefig(FOLDER / f"{draw.__name__}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)


class Residual(nn.Module):
    """A block of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, H, W) to the same."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def nodes() -> Any:
    """Three columns: the user's model, the prepared and the converted one."""
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), Residual(), nn.Conv2d(8, 4, 1))
    report = preparation_report(prepare(network, QATConfig(), (torch.randn(1, 8, 8, 8),)))
    outputs = {
        entry.name: entry.detail.rpartition("output ")[2].removesuffix(", per tensor") for entry in report.quantized
    }
    figure, axis = plt.subplots(figsize=(9.5, 6.2))
    columns = {
        "your model": [
            (GREY, "x"),
            *((BLUE, text) for text in ("Conv2d", "BatchNorm2d", "relu", "Conv2d", "BatchNorm2d", "+", "relu")),
        ],
        "prepared": [
            (ORANGE, f"to {outputs['0']}"),
            (BLUE, "Conv2d, BatchNorm2d, relu"),
            (ORANGE, f"to {outputs['2.conv1']}"),
            (BLUE, "Conv2d, BatchNorm2d"),
            (ORANGE, f"to {outputs['2.conv2']}"),
            (BLUE, "+, relu"),
            (ORANGE, f"to {outputs['2.add']}"),
        ],
        "converted": [
            (ORANGE, "quantize"),
            *((GREEN, text) for text in ("int8 convolution", "int8 convolution", "int8 sum")),
            (ORANGE, "dequantize"),
        ],
    }
    for column, (title, boxes) in enumerate(columns.items()):
        left, places = 3.4 * column, {}
        axis.text(left + 1.2, 8.9, title, ha="center", weight="bold")
        step = 7.6 / (len(boxes) - 1)
        for row, (colour, text) in enumerate(boxes):
            middle = 8.2 - row * step
            _box(axis, left, middle, 2.4, text, colour)
            places[row] = middle
            if row:
                _arrow(axis, (left + 1.2, places[row - 1] - 0.27), (left + 1.2, middle + 0.27))
        first, last = (
            places[0],
            next(places[row] for row, (_, text) in enumerate(boxes) if "+" in text or "sum" in text),
        )
        edge = left + 2.62
        axis.plot([left + 2.4, edge, edge], [first, first, last], color=GREY, lw=1.2)
        _arrow(axis, (edge, last), (left + 2.41, last))
        if title == "prepared":
            for row, (_, text) in enumerate(boxes):
                if "Conv" in text:
                    _box(axis, left - 0.72, places[row] + 0.0, 0.6, "weight\nto int8", ORANGE, size=7.5)
                    _arrow(axis, (left - 0.12, places[row]), (left, places[row]))
    axis.set_xlim(-0.1, 9.6)
    axis.set_ylim(0.2, 9.1)
    axis.axis("off")
    return figure


def grid() -> Any:
    """A grid of 3 bits, and what passes backward."""
    parameters = QuantizationParameters(
        torch.tensor([0.5]), torch.tensor([3]), QuantizationScheme(3, signed=False, symmetric=False)
    )
    x = torch.linspace(-3, 3.5, 1301, requires_grad=True)
    values = fake_quantize(x, parameters)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.5, 4.6), sharex=True, height_ratios=(3, 1))
    above.plot(x.detach(), x.detach(), color=GREY, lw=1, ls="--", label="x")
    above.plot(x.detach(), values.detach(), color=BLUE, label="fake_quantize(x): 8 steps of 0.5")
    above.set_ylabel("forward")
    above.legend(frameon=False)
    below.plot(x.detach(), gradient, color=ORANGE)
    below.set_ylabel("gradient")
    below.set_yticks([0, 1])
    below.set_xlabel("x")
    return figure


def scale_gradient() -> Any:
    """What one value says about the scale."""
    scale = torch.tensor([0.5], requires_grad=True)
    scheme = QuantizationScheme(3)
    x = torch.linspace(-3, 3, 1201)
    gradients = []
    for value in x:
        quantized = fake_quantize(value[None], QuantizationParameters(scale, torch.tensor([0]), scheme))
        gradients.append(float(torch.autograd.grad(quantized.sum(), scale)[0]))
    figure, axis = plt.subplots(figsize=(6.5, 3))
    axis.plot(x, gradients, color=BLUE)
    axis.axvspan(-3, -2.25, color=PALE[ORANGE])
    axis.axvspan(1.75, 3, color=PALE[ORANGE], label="beyond the grid")
    axis.set_xlabel("x, at a scale of 0.5 and codes from -4 to 3")
    axis.set_ylabel("gradient of the scale")
    axis.legend(frameon=False)
    return figure


def scale_search() -> Any:
    """The squared error over the scale, and where learning goes from the extremes."""
    x = torch.randn(1, 20_000)
    zero = torch.tensor([0])
    scheme = QuantizationScheme(4)

    def error(scale: Tensor) -> Tensor:
        return (fake_quantize(x, QuantizationParameters(scale, zero, scheme)) - x).square().mean()

    candidates = torch.linspace(0.1, 0.7, 121)
    scale = (x.abs().max() / scheme.quant_max).reshape(1).requires_grad_()
    optimizer = torch.optim.SGD([scale], lr=40)  # LSQ divides the gradient by the root of 20,000 x 7
    path = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = error(scale)
        loss.backward()
        path.append((float(scale.detach()), float(loss.detach())))
        optimizer.step()
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    axis.plot(candidates, [float(error(one.reshape(1))) for one in candidates], color=GREY, label="squared error")
    axis.plot(*zip(*path, strict=True), "o-", color=BLUE, ms=3, lw=0.8, label="60 steps of SGD on the scale")
    axis.annotate(
        "the extremes", path[0], (path[0][0] - 0.02, path[0][1] + 0.012), ha="center", arrowprops={"arrowstyle": "-"}
    )
    axis.set_xlabel("scale, for 20,000 normal values on 16 codes")
    axis.set_yscale("log")
    axis.legend(frameon=False, loc="upper left")
    return figure


def arithmetic() -> Any:
    """One output of a converted layer, step by step."""
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    x = torch.randn(64, 3)
    prepared = prepare(network, QATConfig(), (x,))
    calibrate(prepared, [x])
    converted = convert(prepared)
    layer: Any = converted[0]
    with torch.no_grad():
        codes = converted.get_submodule("input_1_fake_quantize")(x)
        results = layer(codes)
    row = int(results[:, 0].int().argmax())
    inputs, weights = codes[row].int() - layer.input_zero_point, layer.weight[0].int()
    total = int((inputs * weights).sum() + layer.bias[0])
    factor = float(layer.input_scale * layer.weight_scale[0] / layer.output_scale)
    result = min(max(round(total * factor), 0), 255)
    assert result == int(results[row, 0])
    terms = " + ".join(
        f"({int(code)} - {int(layer.input_zero_point)}) * ({int(weight)})"
        for code, weight in zip(codes[row], weights, strict=True)
    )
    products = int((inputs * weights).sum())
    values = ", ".join(f"{float(value):.3f}" for value in x[row])
    rounding = f"round(x / {float(layer.input_scale):.5f}) + {int(layer.input_zero_point)}"
    boxes = [
        (ORANGE, "input", f"{values}  (float32)"),
        (ORANGE, "quantize", f"{rounding}  =  {codes[row].tolist()}  (uint8)"),
        (GREEN, "products, summed", f"{terms}  =  {products:,}  (int32, exact)"),
        (GREEN, "bias", f"{products:,} + ({int(layer.bias[0]):,})  =  {total:,}  (int32)"),
        (GREEN, "requantize, ReLU", f"clamp(round({total:,} * {factor:.7f}), 0, 255)  =  {result}  (uint8)"),
        (
            ORANGE,
            "stands for",
            f"{result} * {float(layer.output_scale):.5f}  =  {result * float(layer.output_scale):.3f}",
        ),
    ]
    figure, axis = plt.subplots(figsize=(9.5, 4.6))
    for row, (colour, title, text) in enumerate(boxes):
        middle = 5.5 - row
        axis.text(1.55, middle, title, ha="right", va="center", weight="bold")
        _box(axis, 1.7, middle, 8, text, colour)
        if row:
            _arrow(axis, (5.7, middle + 0.73), (5.7, middle + 0.27))
    axis.set_xlim(-0.2, 9.8)
    axis.set_ylim(0.1, 5.9)
    axis.axis("off")
    return figure


def _box(axis: Any, left: float, middle: float, width: float, text: str, colour: str, size: float = 9) -> None:
    shape = FancyBboxPatch(
        (left, middle - 0.27), width, 0.54, boxstyle="round,pad=0,rounding_size=0.1", fc=PALE[colour], ec=colour
    )
    axis.add_patch(shape)
    axis.text(left + width / 2, middle, text, ha="center", va="center", size=size)


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0})


if __name__ == "__main__":
    main()
