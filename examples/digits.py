"""From a float CNN to true int8 on scikit-learn's handwritten digits, in well under a minute on a CPU.

Trains a small residual network in float, quantizes it after training (the baseline) and then with quantization-aware
training, and shows that what was validated is what gets deployed: the converted model computes the same integers.

    python examples/digits.py
    python examples/digits.py --bits 4 --learnable

The library's part is four calls: ``prepare``, ``calibrate``, ``parameter_groups`` (for ``--learnable`` only) and
``convert``. The training loop is plain PyTorch and does not know what it trains.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn

from digits_checks import count_mismatches, median_latencies, reload_into
from digits_report import RangeRecorder, TrainingMonitor, results_table, write_figure, write_json, write_tensors
from mlframework.quantization import (
    QATConfig,
    calibrate,
    convert,
    parameter_groups,
    prepare,
)

FLOAT_EPOCHS = 20
BATCH_SIZE = 60  # 15 batches in an epoch of 898 images; 64 would leave a batch of two
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
INTERRUPTED = 130  # what a shell reports after Ctrl-C: 128 + SIGINT


class ResidualBlock(nn.Module):
    """Two convolutions around which the input takes a short cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        """(N, channels, H, W) to the same shape."""
        hidden = F.relu(self.norm1(self.conv1(input)))
        return F.relu(input + self.norm2(self.conv2(hidden)))


class DigitsNet(nn.Module):
    """Stem, residual block, pooling, linear classifier: 15,000 parameters for 8x8 images."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.block = ResidualBlock(channels)
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(channels * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, 10)."""
        features = self.block(F.relu(self.stem_norm(self.stem(images))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


class DigitsData(NamedTuple):
    """Images (N, 1, 8, 8) with values from 0 to 1, and their digits (N,)."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


def load_data(seed: int) -> DigitsData:
    """Half of the 1,797 digits to train on and half to test on, every digit in both alike."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
    halves = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=seed)
    return DigitsData(*(torch.from_numpy(half) for half in halves))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that the model gets right, in the gradient mode that the caller is in."""
    correct: Tensor = (model.eval()(images).argmax(1) == labels).sum()
    return 100 * correct.item() / len(labels)


@torch.no_grad()
def test_accuracy(model: nn.Module, data: DigitsData) -> float:
    """Accuracy as deployed: without gradients, where a prepared model computes on integers."""
    return accuracy(model, data.test_images, data.test_labels)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: DigitsData, epochs: int, monitor: TrainingMonitor
) -> None:
    """The training loop for float and quantized models alike.

    The accuracy after each epoch is for the eyes only: the last epoch's model is the result, whatever it scores.
    """
    steps = epochs * -(-len(data.train_images) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        model.train()
        for batch in torch.split(torch.randperm(len(data.train_images)), BATCH_SIZE):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            monitor.step_done(loss.item())
        monitor.epoch_done(test_accuracy(model, data))


def train_float(data: DigitsData, seed: int, monitor: TrainingMonitor) -> DigitsNet:
    """The float model that everything else starts from."""
    torch.manual_seed(seed)
    model = DigitsNet()
    with monitor.phase("float training", FLOAT_EPOCHS):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        train(model, optimizer, data, FLOAT_EPOCHS, monitor)
    return model


def prepare_and_calibrate(model: DigitsNet, data: DigitsData, bits: int, learnable: bool) -> nn.Module:
    """A prepared copy whose scales come from the training images; converted as it is, the post-training baseline.

    A copy, because a prepared model trains the parameters of the model it was made from.
    """
    config = QATConfig(weight_bits=bits, activation_bits=bits, learnable=learnable)
    prepared = prepare(copy.deepcopy(model), config, (data.train_images[:1],))
    calibrate(prepared, torch.split(data.train_images, BATCH_SIZE))
    return prepared


def scale_learning_rate(bits: int) -> float:
    """Adam's steps have a fixed size, and scales shrink as the grid gets finer: so must their learning rate."""
    return 5e-3 * min(1.0, 2.0 ** (4 - bits))


def train_quantized(
    prepared: nn.Module, data: DigitsData, bits: int, epochs: int, seed: int, monitor: TrainingMonitor
) -> None:
    """Quantization-aware training, in place."""
    torch.manual_seed(seed)
    with monitor.phase("QAT", epochs):
        groups = parameter_groups(prepared, quantization_learning_rate=scale_learning_rate(bits))
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        train(prepared, optimizer, data, epochs, monitor)


def run(options: argparse.Namespace, monitor: TrainingMonitor) -> bool:
    """Trains, quantizes, compares, writes; says whether the converted model computes what was validated."""
    started = time.perf_counter()
    folder: Path = options.output
    data = load_data(options.seed)

    model = train_float(data, options.seed, monitor)
    float_bytes = monitor.written(write_tensors(folder / "float.safetensors", model.state_dict()))

    monitor.enter("post-training quantization")
    prepared = prepare_and_calibrate(model, data, options.bits, options.learnable)
    post_training = convert(prepared)

    with RangeRecorder(prepared) as ranges:
        train_quantized(prepared, data, options.bits, options.epochs, options.seed, monitor)

    monitor.enter("conversion")
    int8_model = convert(prepared)
    int8_path = folder / "int8.safetensors"
    int8_bytes = monitor.written(write_tensors(int8_path, int8_model.state_dict()))
    reloaded = reload_into(copy.deepcopy(post_training), int8_path)  # the same architecture, other weights and scales

    monitor.enter("comparison")
    comparison = count_mismatches(prepared, int8_model, reloaded, data.test_images)
    names = ("float", "post-training int8", "QAT simulated", "true int8")
    models = dict(zip(names, (model, post_training, prepared, int8_model), strict=True))
    accuracies = {name: test_accuracy(contender, data) for name, contender in models.items()}
    # With gradients enabled, a prepared model simulates in float instead of computing on integers.
    accuracies["QAT simulated"] = accuracy(prepared, data.test_images, data.test_labels)
    latencies = {
        batch: median_latencies(models, data.test_images[:batch], simulated="QAT simulated") for batch in (1, 256)
    }
    sizes = {"float": float_bytes, "post-training int8": int8_bytes, "true int8": int8_bytes}

    monitor.enter("report")
    monitor.written(write_figure(folder / "training.png", monitor.losses, ranges))
    summary = {
        "float_accuracy": accuracies["float"],
        "ptq_accuracy": accuracies["post-training int8"],
        "qat_accuracy": accuracies["QAT simulated"],
        "int8_accuracy": accuracies["true int8"],
        **comparison._asdict(),
        "float_bytes": float_bytes,
        "int8_bytes": int8_bytes,
        "median_milliseconds": latencies,
        "seed": options.seed,
        "bits": options.bits,
        "learnable": options.learnable,
        "float_epochs": FLOAT_EPOCHS,
        "qat_epochs": options.epochs,
        "seconds": time.perf_counter() - started,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mlframework-quantization": version("mlframework-quantization"),
        },
    }
    monitor.written(write_json(folder / "summary.json", summary))
    monitor.console.print(results_table(accuracies, sizes, latencies, options.bits))
    monitor.say(str(comparison))
    monitor.say(f"{time.perf_counter() - started:.0f} s. Written to {folder}: {', '.join(monitor.files)}")
    return comparison.agrees


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """Reads an option's value and says what would have been right where it is wrong."""
    expected = f"a whole number from {lowest}" + ("" if highest is None else f" to {highest}")

    def read(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() else None
        if value is None or value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line and makes the output folder, so that what is wrong is said before any training."""
    parser = argparse.ArgumentParser(description="Quantization-aware training to true int8 on handwritten digits.")
    parser.add_argument("--bits", type=whole_number(2, 8), default=8, help="of weights and activations (default 8)")
    parser.add_argument("--learnable", action="store_true", help="let the optimizer train the scales")
    parser.add_argument("--epochs", type=whole_number(1), default=10, help="of QAT (default 10)")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="of split and training (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/digits"), help="folder (default out/digits)")
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make the folder {options.output}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The demo; returns the exit status."""
    options = parse_options(arguments)
    # On layers this small a second thread costs more than it brings, and one gives the same sums on every machine.
    torch.set_num_threads(1)
    monitor = TrainingMonitor(Console())
    try:
        return 0 if run(options, monitor) else 1
    except KeyboardInterrupt:
        monitor.say(monitor.where_it_stands(options.output))
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
