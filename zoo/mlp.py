"""A multi-layer perceptron."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Flattens its input, (N, ...), and classifies it.

    Args:
        inputs: values per example.
        hidden: widths of the hidden layers.
        classes: length of the result, (N, classes).
        batch_norm: whether to normalize what each hidden layer computes.
    """

    def __init__(
        self, inputs: int, hidden: tuple[int, ...] = (512, 512), classes: int = 10, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten())
        for width in hidden:
            self.layers.append(nn.Linear(inputs, width))
            if batch_norm:
                self.layers.append(nn.BatchNorm1d(width))
            self.layers.append(nn.ReLU())
            inputs = width
        self.layers.append(nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
