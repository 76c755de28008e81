"""Float networks that are trained here: once, from a seed, and then read from the folder of the study."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from .protocol import Batch

FOLDER = Path(__file__).resolve().parents[2] / ".study"


def trained_once(name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """The network with the weights of ``.study/NAME.pt``, in evaluation mode; where there are none, it is trained.

    Its dropouts drop nothing from then on: a student is to see what its teacher sees.

    Args:
        name: of the file. What is trained otherwise needs another name.
        make: makes the network, from the global random state.
        train: trains it in place.
    """
    path = FOLDER / f"{name}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            train(model)
            FOLDER.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(model.state_dict(), partial)
            partial.replace(path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Callable[[object, Batch], Tensor],
    steps: int,
    learning_rate: float,
    description: str,
) -> None:
    """AdamW with a learning rate that rises over a tenth of the steps and falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in track(range(steps), description):
        batch = next(batches)
        value = loss(model(*batch.inputs), batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
