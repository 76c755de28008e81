"""From a float vision transformer to true int8 in Hugging Face's ``Trainer``, on scikit-learn's handwritten digits.

    python examples/transformers_digits.py

Nothing is downloaded: the network is made from its configuration. It trains in float, then with quantization-aware
training by ``QATTrainerCallback``, which exports the best checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from digits import load_data
from mlframework.quantization import QATConfig, convert, prepare, verify
from mlframework.quantization.integrations.transformers import QATTrainerCallback


class Digits(Dataset[dict[str, Tensor]]):
    """Images (N, 1, 8, 8) and their digits, as a ``Trainer`` takes them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def vision_transformer() -> nn.Module:
    """Two blocks on 16 patches of 2x2 pixels: 70,000 parameters."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    return ViTForImageClassification(config)


def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Of the outputs, so that the model is called as it is after deployment: without labels."""
    return F.cross_entropy(outputs["logits"], labels)


def accuracy(prediction: Any) -> dict[str, float]:
    """Percent of the images."""
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(model: Any, folder: Path, train: Digits, test: Digits, callbacks: list[Any], **options: Any) -> Trainer:
    """For a CPU, where nothing is reported."""
    model.accepts_loss_kwargs = False  # or the model is called with what its own loss would take
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=60,
        per_device_eval_batch_size=len(test),
        save_total_limit=1,
        metric_for_best_model="accuracy",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_loss_func=loss,
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Quantization-aware training to true int8 in transformers.Trainer.")
    parser.add_argument("--float-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=4, help="of QAT (default 4)")
    parser.add_argument("--output", type=Path, default=Path("out/transformers_digits"), help="folder")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "digits.onnx"
    set_seed(0)
    torch.set_num_threads(1)  # on layers this small a second one costs more than it brings

    data = load_data(seed=0)
    train, test = Digits(data.train_images, data.train_labels), Digits(data.test_images, data.test_labels)
    model = vision_transformer()
    in_float = {"num_train_epochs": options.float_epochs, "learning_rate": 2e-3, "save_strategy": "no"}
    training = trainer(model, options.output, train, test, [], **in_float)
    training.train()
    print(f"float: {training.evaluate()['eval_accuracy']:.2f} %")

    example = {"pixel_values": data.train_images[:2]}
    prepared = prepare(model, QATConfig(), example_kwargs=example)
    callback = QATTrainerCallback(
        schedule={"observe_until": 15 * options.epochs // 2}, export_path=file, example_kwargs=example
    )
    in_int8 = {"num_train_epochs": options.epochs, "learning_rate": 2e-4, "load_best_model_at_end": True}
    each = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    training = trainer(prepared, options.output, train, test, [callback], **in_int8, **each)
    training.train()

    int8_model = convert(prepared)
    images = {"pixel_values": data.test_images}
    report = verify(prepared, [images], converted=int8_model)
    with torch.no_grad():
        predicted = int8_model(**images).logits.argmax(1)
    session = onnxruntime.InferenceSession(file)
    (logits,) = session.run(None, {session.get_inputs()[0].name: data.test_images.numpy()})
    agreeing = 100 * float((torch.from_numpy(logits).argmax(1) == predicted).float().mean())
    correct = 100 * float((predicted == data.test_labels).float().mean())
    print(f"int8: {correct:.2f} %, {len(report.layers)} layers agree code for code with what was validated")
    print(f"{file}: the same digit for {agreeing:.2f} % of the images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
