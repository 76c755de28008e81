"""From a float CNN to true int8 in a Lightning ``Trainer``, on scikit-learn's handwritten digits.

    python examples/lightning_digits.py

Trains in float, then with quantization-aware training by ``QATCallback``, whose file is checked code for code against
the model that was validated. ``examples/digits.py`` does the same in a loop of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from digits import BATCH_SIZE, DigitsNet, load_data, test_accuracy
from mlframework.quantization import QATConfig, convert, verify
from mlframework.quantization.integrations.lightning import QATCallback


class DigitsModule(pl.LightningModule):
    """A plain LightningModule, which knows nothing of quantization."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.model = DigitsNet()
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-2)


def trainer(epochs: int, callbacks: list[Any]) -> pl.Trainer:
    """For a CPU, where nothing but the result is kept."""
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Quantization-aware training to true int8 in Lightning.")
    parser.add_argument("--float-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=5, help="of QAT (default 5)")
    parser.add_argument("--output", type=Path, default=Path("out/lightning_digits"), help="folder")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "digits.onnx"
    pl.seed_everything(0)
    torch.set_num_threads(1)  # on layers this small a second one costs more than it brings

    data = load_data(seed=0)
    batches = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=BATCH_SIZE, shuffle=True)
    held_out = DataLoader(TensorDataset(data.test_images, data.test_labels), batch_size=len(data.test_images))

    module = DigitsModule()
    trainer(options.float_epochs, []).fit(module, batches, held_out)
    print(f"float: {test_accuracy(module.model, data):.2f} %")

    steps = options.epochs * len(batches)
    callback = QATCallback(
        QATConfig(),
        (data.train_images[:1],),
        schedule={"observe_until": steps // 2 + 1, "freeze_batch_norm_from": steps // 2},
        export_path=file,
    )
    module.learning_rate /= 10
    module.train()  # a fit leaves modes as they are, and in evaluation nothing is observed
    trainer(options.epochs, [callback]).fit(module, batches, held_out)

    int8_model = convert(module.model)
    report = verify(module.model, [data.test_images], converted=int8_model, path=file)
    print(f"int8: {test_accuracy(int8_model, data):.2f} %, {len(report.layers)} layers agree code for code with {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
