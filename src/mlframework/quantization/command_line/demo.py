"""The demonstration: a small network from float to a verified file, on scikit-learn's handwritten digits."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.calibrate import calibrate
from ..conversion.convert import convert
from ..export.export_onnx import export_onnx
from ..preparation.prepare import prepare
from ..qat.config import QATConfig
from ..verification.compare import verify

_SEED = 0
_BATCH = 60
_FLOAT_EPOCHS, _QUANTIZED_EPOCHS = 5, 1


class Step(NamedTuple):
    """What one step of the demonstration came to.

    Attributes:
        name: what was done.
        result: in words.
        seconds: how long it took.
    """

    name: str
    result: str
    seconds: float


def demonstration() -> list[Step]:
    """Trains, quantizes, exports and verifies.

    Raises:
        ImportError: scikit-learn, onnx, onnxscript or onnxruntime is not installed.
        VerificationError: the file computes other integers than the model.
    """
    images, labels = _digits()
    half = len(images) // 2
    train, test = (images[:half], labels[:half]), (images[half:], labels[half:])
    steps: list[Step] = []
    start = time.perf_counter()

    def done(name: str, result: str) -> None:
        nonlocal start
        steps.append(Step(name, result, time.perf_counter() - start))
        start = time.perf_counter()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = _network()
        _train(model, *train, _FLOAT_EPOCHS, 3e-3)
        done("train in float", f"{_accuracy(model, *test):.1f} % of {len(test[1])} digits")
        prepared = prepare(model, QATConfig(), (images[:1],))
        calibrate(prepared, torch.split(train[0], _BATCH))
        done("prepare and calibrate", f"{_accuracy(prepared, *test):.1f} %")
        _train(prepared, *train, _QUANTIZED_EPOCHS, 3e-4)
        done("train quantized", f"{_accuracy(prepared, *test):.1f} %")
    converted = convert(prepared)
    done("convert to int8", f"{_accuracy(converted, *test):.1f} %")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.onnx")
        export_onnx(converted, (images[:1],), path)
        done("export ONNX", f"{os.path.getsize(path):,} bytes")
        report = verify(prepared, torch.split(test[0], _BATCH), converted=converted, path=path)
        done("verify in ONNX Runtime", f"{len(report.layers)} layers and results, none differs")
    return steps


def _digits() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) from 0 to 1 and labels (N,), in an order of chance."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"demo needs scikit-learn ({error}): pip install 'mlframework-quantization[cli,demo]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    values = torch.from_numpy(images).to(torch.float32).reshape(-1, 1, 8, 8) / 16
    return values[order], torch.from_numpy(labels)[order]


def _network() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 4, 10))


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images)), _BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()


@torch.no_grad()
def _accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == labels).to(torch.float32).mean())
