"""What pages speak of without making it: the reader's own network, data and loop."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mlframework.quantization as quantization
from docs.snippets import snippets
from example_models import EXAMPLES, train_briefly
from ranks import process_group

Names = dict[str, Any]


def set_up(page: str) -> AbstractContextManager[Names]:
    """The names that a page's blocks begin with; none for a page whose blocks make all that they use."""
    return _SETUPS[page]() if page in _SETUPS else nullcontext({})


def run_blocks(page: str) -> None:
    """Runs the blocks of a page one after the other, in the present folder; skips the test where some cannot run."""
    left_out = []
    with set_up(page) as names:
        namespace: Names = {"__name__": "__main__", **names}
        for snippet in snippets(page):
            if snippet.missing:
                left_out.append(f"line {snippet.line} needs {', '.join(snippet.missing)}")
            elif snippet.kind != "before":
                own_names = {"__name__": "__main__"} if snippet.kind == "file" else namespace
                exec(compile(snippet.tree, f"docs/{page}", "exec"), own_names)
    if left_out:
        pytest.skip(f"{page}: {'; '.join(left_out)} (all else ran)")


def _public() -> Names:
    return {name: getattr(quantization, name) for name in quantization.__all__} | {"torch": torch, "F": F}


def _from(module: str, *names: str) -> Names:
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in names}


@contextmanager
def _accuracy() -> Iterator[Names]:
    example = EXAMPLES["cnn"]
    float_model = example.make().eval()
    batches = [example.inputs()[0] for _ in range(2)]
    model = quantization.prepare(float_model, quantization.QATConfig(weight_bits=4), (batches[0],))
    quantization.calibrate(model, batches)
    yield _public() | {"float_model": float_model, "model": model, "batches": batches}


@contextmanager
def _training() -> Iterator[Names]:
    """On a single rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    transformer = EXAMPLES["transformer"]
    x = transformer.inputs()[0]
    config = quantization.QATConfig(learnable=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([transformer.make()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with process_group(0, os.getcwd(), ranks=1):
        yield (
            _public()
            | {
                "Net": Net,
                "config": config,
                "dist": torch.distributed,
                "mesh": init_device_mesh("cpu", (1,)),
                "model": Net(),
                "parallel": DistributedDataParallel(quantization.prepare(Net(), config, (x,))),
                "prepared": quantization.prepare(Net(), config, (x,)),
                "train": lambda model: train_briefly(model, (x,)),
                "x": x,
            }
            | _from("peft", "LoraConfig", "get_peft_model")
            | _from("torch.distributed.algorithms.join", "Join")
            | _from("torch.distributed.checkpoint.state_dict", "StateDictOptions", "get_model_state_dict")
            | _from("torch.distributed.fsdp", "MixedPrecisionPolicy", "fully_shard")
        )


@contextmanager
def _one_rank() -> Iterator[Names]:
    """What ``torchrun --nproc-per-node 1`` sets."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield {}


class _Digits(Dataset[dict[str, Tensor]]):
    """As a ``Trainer`` takes them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 8, 8), "labels": torch.tensor(index)}


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(pixel_values)}


@contextmanager
def _trainers() -> Iterator[Names]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own
        import pytorch_lightning as pl

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = _Classifier().layers

            def training_step(self, batch: list[Tensor], index: int) -> Tensor:
                return F.cross_entropy(self.model(batch[0]), batch[1])

            def validation_step(self, batch: list[Tensor], index: int) -> None:
                self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        images = torch.randn(8, 1, 8, 8)
        loader = DataLoader(TensorDataset(images, torch.arange(8)), batch_size=4)
        prepared = quantization.prepare(_Classifier().layers, quantization.QATConfig(), (images,))
        transformers = _from("transformers", "Trainer", "TrainingArguments")
        tensorboard = _from("torch.utils.tensorboard", "SummaryWriter")
        yield (
            _public()
            | {
                "arguments": transformers["TrainingArguments"](
                    "trainer", num_train_epochs=2, label_names=["labels"], report_to="none", use_cpu=True
                ),
                "digits_to_test": _Digits(),
                "digits_to_train": _Digits(),
                "images": images,
                "loader": loader,
                "model": _Classifier(),
                "module": Module(),
                "optimizer": torch.optim.SGD(prepared.parameters(), lr=0.01),
                "pl": pl,
                "prepared": prepared,
                "step": 100,
                "train": loader,
                "val": loader,
                "writer": tensorboard["SummaryWriter"]("runs/trainer"),
            }
            | transformers
            | _from("accelerate", "Accelerator")
            | _from("pytorch_lightning.callbacks", "ModelCheckpoint")
            | tensorboard
        )


_SETUPS: dict[str, Callable[[], AbstractContextManager[Names]]] = {
    "accuracy.md": _accuracy,
    "how-to/ddp.md": _one_rank,
    "trainers.md": _trainers,
    "training.md": _training,
}
