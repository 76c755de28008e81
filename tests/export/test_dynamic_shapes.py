"""Files for any height and width, sequence length or whatever axis is named: the same codes at sizes that the example
has not; and where that cannot be, an error that says what and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from export.exported_file import ExportedFile
from mlframework.quantization import NotExportableError, QATConfig, calibrate, export_onnx, prepare
from zoo import GPT, NETWORKS

pytestmark = pytest.mark.slow


class Audio(nn.Module):
    """Scores of three classes for sound (N, 2, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 8, 5, stride=2, padding=2)
        self.second = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.pool = nn.AvgPool1d(2)
        self.average = nn.AdaptiveAvgPool1d(1)
        self.scores = nn.Linear(8, 3)

    def forward(self, sound: Tensor) -> Tensor:
        hidden = F.relu(self.first(sound))
        hidden = self.pool(F.relu6(hidden + self.second(hidden)))
        return self.scores(self.average(hidden).flatten(1))


class Pooled(nn.Module):
    """A pooling of images between two convolutions."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = pool
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.pool(F.relu(self.stem(images))))


class Residual(nn.Module):
    """Strides, a sum, and the average of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, 4, 3, 2, 1)
        self.short_cut = nn.MaxPool2d(3, 2, 1)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.average(F.relu(self.strided(hidden) + self.short_cut(hidden)))


class Halved(nn.Module):
    """Adds what was halved and doubled again: even sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(F.max_pool2d(hidden, 2))


class Tokens(nn.Module):
    """Averages of rows that are looked up, with a mask in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 6)
        self.layer = nn.Linear(6, 4)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return self.layer(self.table(given["tokens"])) * given["mask"].unsqueeze(-1)


class FixedHeight(nn.Module):
    """A number where the height belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        return self.last(hidden.reshape(hidden.shape[0], 4, 8, -1).transpose(2, 3))


def prepared_with(model: nn.Module, *example: Any, **options: Any) -> nn.Module:
    prepared = prepare(model.eval(), QATConfig(**options), example)
    calibrate(prepared, [example])
    return prepared


def images(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape),)


def from_zoo(name: str, example: tuple[Tensor, ...]) -> nn.Module:
    return prepared_with(NETWORKS[name].make(), *example)


def tokens(batch: int, length: int) -> tuple[Tensor]:
    return (torch.randint(0, 64, (batch, length)),)


class Case(NamedTuple):
    """A network, the sizes of its example, what is open, other sizes; whether it computes in float between layers."""

    model: Callable[..., nn.Module]
    inputs: Callable[..., tuple[Tensor]]
    example: tuple[int, ...]
    shapes: Any
    others: list[tuple[int, ...]]
    has_floats_inside: bool = False


_NETWORKS = {
    "U-Net": Case(
        lambda *example: from_zoo("unet", example),
        images,
        (2, 3, 16, 16),
        {"x": {0: Dim("batch"), 2: 4 * Dim("rows", min=2), 3: 4 * Dim("columns", min=2)}},
        [(1, 3, 24, 8), (3, 3, 8, 36)],
    ),
    "residual network": Case(
        lambda *example: prepared_with(Pooled(Residual()), *example),
        images,
        (1, 3, 16, 16),  # torch.export would take a batch of 1 for fixed
        ({0: Dim("batch"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),
        [(3, 3, 24, 9), (1, 3, 41, 32)],
    ),
    "audio": Case(
        lambda *example: prepared_with(Audio(), *example),
        images,
        (2, 2, 32),
        {"sound": [Dim("batch"), None, Dim("time", min=8)]},
        [(1, 2, 100), (3, 2, 37)],
    ),
    "transformer": Case(
        lambda *example: prepared_with(GPT(vocabulary=64, context=16, width=16, layers=1, heads=2), *example),
        tokens,
        (2, 12),
        {"tokens": {0: Dim("batch"), 1: Dim("length", max=16)}},
        [(1, 16), (3, 5)],
        has_floats_inside=True,
    ),
}


@pytest.mark.parametrize("case", _NETWORKS.values(), ids=_NETWORKS)
def test_codes_at_other_sizes(case: Case, tmp_path: Path) -> None:
    example = case.inputs(*case.example)
    file = ExportedFile(case.model(*example), example, tmp_path, dynamic_shapes=case.shapes)
    for sizes in case.others:
        differing, compared = file.differences(*case.inputs(*sizes), float_tolerance=0.01 * case.has_floats_inside)
        # Two libraries round float sums differently: a few codes may fall on the other side of a boundary, no more.
        assert sum(differing.values()) <= 5 * case.has_floats_inside
        assert compared >= 4


_ANY_SIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "windows": nn.AvgPool2d(3, 2, 1),
    "windows over all of the example": nn.AvgPool2d((8, 1)),
    "another divisor": nn.AvgPool2d(3, 1, 1, divisor_override=5),
    "average of everything": nn.AdaptiveAvgPool2d(1),
    "mean of a dimension": lambda values: values.mean(3, keepdim=True),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if index % 2 else ()) for index, name in enumerate(_ANY_SIZE)],
)
def test_averages_of_any_size(name: str, tmp_path: Path) -> None:
    pool = _ANY_SIZE[name]
    example = images(2, 3, 16, 8)
    shapes = {"images": {2: 8 * Dim("rows", min=2), 3: Dim("width", min=3)}}
    file = ExportedFile(prepared_with(Pooled(pool), *example), example, tmp_path, dynamic_shapes=shapes)
    for other in (images(2, 3, 32, 17), images(2, 3, 24, 5)):
        assert file.differences(*other)[0] == {}


_FIXED_WINDOWS: dict[str, nn.Module] = {
    "padding that does not count": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "a last window that may be cut off": nn.AvgPool2d(2, ceil_mode=True),
    "as many windows as are asked for": nn.AdaptiveAvgPool2d(2),
    "maxima of as many windows": nn.AdaptiveMaxPool2d(2),
}


@pytest.mark.parametrize("pool", _FIXED_WINDOWS.values(), ids=_FIXED_WINDOWS)
def test_windows_that_depend_on_the_size(pool: nn.Module, tmp_path: Path) -> None:
    """torch.onnx would write those of the example."""
    prepared = prepared_with(Pooled(pool), *images(2, 3, 8, 8))
    shapes = {"images": {2: Dim("height", min=8)}}
    with pytest.raises((ValueError, NotExportableError), match=r"pool.*windows|windows.*pool"):
        export_onnx(prepared, images(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_shapes=shapes)
    assert not list(tmp_path.iterdir())


def test_windows_of_the_size_for_other_engines(tmp_path: Path) -> None:
    prepared = prepared_with(Pooled(nn.AdaptiveAvgPool2d(2)), *images(2, 3, 8, 8), target="openvino")
    with pytest.raises(ValueError, match=r"must not leave open what adaptive pooling to \(2, 2\) .* in pool"):
        export_onnx(
            prepared, images(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_shapes={"images": {3: Dim("width", min=8)}}
        )


def test_axes_have_the_names_of_their_dims(tmp_path: Path) -> None:
    example = ({"tokens": torch.randint(0, 16, (2, 5)), "mask": torch.rand(2, 5)},)
    length = Dim("length")
    shapes = ({"tokens": {0: Dim.AUTO, 1: length}, "mask": {0: Dim.AUTO, 1: length}},)
    file = ExportedFile(prepared_with(Tokens(), *example), example, tmp_path, dynamic_shapes=shapes)
    axes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    ]
    assert axes == [["given_tokens_0", "length"], ["given_tokens_0", "length"], ["given_tokens_0", "length", 4]]


@pytest.mark.parametrize("dim", [Dim("height"), Dim.DYNAMIC], ids=["Dim", "DYNAMIC"])
def test_an_axis_that_the_code_fixes(dim: Any, tmp_path: Path) -> None:
    prepared = prepared_with(FixedHeight(), *images(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"axis 2 of 'images' has to be 8 for reshape.*\.reshape\(.*, 4, 8, -1\)"):
        export_onnx(prepared, images(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_shapes={"images": {2: dim}})
    assert not list(tmp_path.iterdir())


def test_an_axis_of_an_argument_that_is_called_otherwise_inside(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(ValueError, match=r"axis 3 of 'input' has to be 8 for 2 \("):
        export_onnx(
            prepared_with(model, *images(2, 3, 8, 8)),
            images(2, 3, 8, 8),
            tmp_path / "model.onnx",
            dynamic_shapes={"input": {3: Dim("width")}},
        )


def test_what_the_code_assumes_of_an_axis(tmp_path: Path) -> None:
    prepared = prepared_with(Pooled(Halved()), *images(2, 3, 8, 8))
    message = r"axis 2 of 'images' .*\(for pool.add \(.*torch\.export suggests .*height = 2\*_height"
    with pytest.raises(ValueError, match=message):
        export_onnx(
            prepared, images(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_shapes={"images": {2: Dim("height", min=4)}}
        )


_LENGTH = Dim("length")
_WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "another argument": ({"y": {0: _LENGTH}}, ValueError, r"must name arguments of example_inputs \(images\), got 'y'"),
    "an axis too many": ({"images": {4: _LENGTH}}, ValueError, "must name axes of 'images', which has 4, got 4"),
    "an axis from the end": ({"images": {-1: _LENGTH}}, ValueError, "must name axes of 'images', which has 4, got -1"),
    "too few axes": ({"images": [_LENGTH]}, ValueError, "an entry for each of the 4 axes of 'images', got 1"),
    "too many arguments": (({0: _LENGTH}, None), ValueError, "an entry for each of the 1 arguments, got 2"),
    "no axis": ({"images": {0: Dim.STATIC, 1: 3}}, ValueError, "must name an axis of any size"),
    "no dictionary": (3, TypeError, "must be a dict by argument name or a tuple, got int"),
    "a Dim for a tensor": ({"images": _LENGTH}, TypeError, "must have for the tensor 'images' a dict from axes to"),
}


@pytest.mark.parametrize(("shapes", "error", "message"), _WRONG.values(), ids=_WRONG)
def test_bad_shapes(shapes: Any, error: type[Exception], message: str, tmp_path: Path, pooled: nn.Module) -> None:
    with pytest.raises(error, match=message):
        export_onnx(pooled, images(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_shapes=shapes)
    assert not list(tmp_path.iterdir())


def test_shapes_and_a_batch_of_any_size_exclude_each_other(tmp_path: Path, pooled: nn.Module) -> None:
    with pytest.raises(ValueError, match="dynamic_batch must be None or False where dynamic_shapes say"):
        export_onnx(
            pooled,
            images(2, 3, 8, 8),
            tmp_path / "model.onnx",
            dynamic_batch=True,
            dynamic_shapes={"images": {2: _LENGTH}},
        )


@pytest.fixture(scope="module")
def pooled() -> nn.Module:
    return prepared_with(Pooled(nn.MaxPool2d(2)), *images(2, 3, 8, 8))
