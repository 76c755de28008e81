"""What the digits demo shows and writes: progress, activation ranges, the table, the figure, the files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from digits_checks import activation_nodes
from mlframework.quantization import FakeQuantizeLayer

_BLUE, _RED, _GREY = "#4477aa", "#cc3311", "#666666"
_COLUMNS = 3


class TrainingMonitor:
    """Knows where the run is: shows it while it goes on, and says it when it is interrupted.

    On a terminal, a bar follows every step. Elsewhere (a file, a pipe) there is one line for each training that ends.

    Attributes:
        losses: the loss of every step, by phase.
        files: names of the files written so far.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.losses: dict[str, list[float]] = {}
        self.files: list[str] = []
        self._phase = "loading the data"
        self._epoch = self._epochs = 0
        self._accuracy: float | None = None
        self._bar: tuple[Progress, TaskID] | None = None

    def enter(self, phase: str) -> None:
        """Notes what is being done now."""
        self._phase, self._epoch, self._epochs = phase, 0, 0

    @contextmanager
    def phase(self, name: str, epochs: int) -> Iterator[None]:
        """A training, from its first step to its last."""
        self.enter(name)
        self._epochs, self._accuracy, self.losses[name] = epochs, None, []
        with self._progress() as progress:
            self._bar = progress, progress.add_task(name, total=epochs, state="")
            yield
        if not self.console.is_terminal:
            self.say(f"{name}: {epochs} epochs, {self._state()}")

    def step_done(self, loss: float) -> None:
        """Counts one step of the optimizer."""
        self.losses[self._phase].append(loss)
        self._show()

    def epoch_done(self, accuracy: float) -> None:
        """Counts one epoch; ``accuracy`` is in percent."""
        self._epoch += 1
        self._accuracy = accuracy
        self._show()

    def written(self, path: Path) -> int:
        """Notes a file that is complete; returns its size in bytes."""
        self.files.append(path.name)
        return path.stat().st_size

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def where_it_stands(self, folder: Path) -> str:
        """One line for whoever interrupted the run."""
        parts = [f"Interrupted in: {self._phase}"]
        if self._epochs:
            parts.append(f"{self._epoch} of {self._epochs} epochs done")
        if self._accuracy is not None:
            parts.append(f"last test accuracy {self._accuracy:.2f} %")
        parts.append(f"complete in {folder}: {', '.join(self.files) or 'no file yet'}")
        return "; ".join(parts)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("epoch {task.completed}/{task.total}  {task.fields[state]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def _show(self) -> None:
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=self._epoch, state=self._state())

    def _state(self) -> str:
        loss = self.losses[self._phase][-1:]
        parts = [f"loss {value:.4f}" for value in loss]
        if self._accuracy is not None:
            parts.append(f"test accuracy {self._accuracy:.2f} %")
        return "  ".join(parts)


class StepRange(NamedTuple):
    """One activation in one training step: the extremes of its values, and the ends of what its codes cover."""

    lowest: float
    highest: float
    lowest_code: float
    highest_code: float


class RangeRecorder:
    """Records, while the model trains, what range each activation spans and what range its codes cover.

    Attributes:
        ranges: for every step, by the name of the activation, in the order in which they are computed.
        grids: the integer type of each.
    """

    def __init__(self, prepared: nn.Module) -> None:
        self.ranges: dict[str, list[StepRange]] = {}
        self._nodes = activation_nodes(prepared)
        self.grids = {name: str(node.scheme).partition(" ")[0] for name, node in self._nodes.items()}
        self._hooks = ExitStack()

    def __enter__(self) -> RangeRecorder:
        for name, node in self._nodes.items():
            self._hooks.enter_context(node.register_forward_hook(partial(self._record, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _record(self, name: str, node: FakeQuantizeLayer, args: tuple[Tensor], output: Tensor) -> None:
        if not node.training:
            return
        lowest, highest = args[0].detach().aminmax()
        scale, zero_point = node.parameters_on_grid.scale.item(), node.parameters_on_grid.zero_point.item()
        codes = (scale * (code - zero_point) for code in (node.scheme.quant_min, node.scheme.quant_max))
        self.ranges.setdefault(name, []).append(StepRange(lowest.item(), highest.item(), *codes))


def results_table(
    accuracies: Mapping[str, float],
    sizes: Mapping[str, int],
    latencies: Mapping[int, Mapping[str, float]],
    bits: int,
) -> Table:
    """Accuracy, size and speed of each model; the simulation has no file, since nobody deploys it."""
    caption = "latencies: medians, one thread" + ("" if bits == 8 else f"; {bits}-bit codes are stored as int8")
    table = Table(title=f"Digits, {bits}-bit weights and activations", caption=caption)
    table.add_column("model")
    for heading in ("accuracy", "file size", *(f"batch {batch}" for batch in latencies)):
        table.add_column(heading, justify="right")
    for name, percent in accuracies.items():
        size = f"{sizes[name] / 1000:.1f} kB" if name in sizes else "-"
        table.add_row(name, f"{percent:.2f} %", size, *(f"{times[name]:.2f} ms" for times in latencies.values()))
    return table


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place when it is complete and vanishes otherwise."""
    partial_file = path.with_name(f".{path.name}.partial")
    try:
        yield partial_file
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a state dict as safetensors."""
    with replacing(path) as file:
        file.write_bytes(save(dict(tensors)))
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes indented JSON."""
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def write_figure(path: Path, losses: Mapping[str, Sequence[float]], recorder: RangeRecorder) -> Path:
    """Draws the losses, and for every activation the range of its values against the range of its codes."""
    figure = Figure(figsize=(13, 6.5))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2.4))[0]
    left.suptitle("Loss", fontsize=13)
    for axes, (phase, values) in zip(left.subplots(len(losses), 1, squeeze=False).flat, losses.items(), strict=True):
        _draw_losses(axes, phase, values)
    right.suptitle("Activation ranges during QAT", fontsize=13)
    rows = len(recorder.ranges) // _COLUMNS + 1  # one panel at least is left for the legend
    panels = list(right.subplots(rows, _COLUMNS, squeeze=False).flat)
    for panel, (name, steps) in zip(panels, recorder.ranges.items(), strict=False):
        _draw_ranges(panel, f"{name.removesuffix('_fake_quantize')}  ({recorder.grids[name]})", steps)
    for panel in panels[len(recorder.ranges) :]:
        panel.axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return path


def _draw_losses(axes: Axes, phase: str, losses: Sequence[float]) -> None:
    window = max(1, len(losses) // 20)
    averages = [sum(losses[max(0, end - window) : end]) / min(window, end) for end in range(1, len(losses) + 1)]
    axes.plot(losses, color=_BLUE, alpha=0.3, linewidth=0.8, label="each batch")
    axes.plot(averages, color=_BLUE, linewidth=1.8, label=f"mean of {window} batches")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    _label(axes, phase, "cross-entropy")


def _draw_ranges(axes: Axes, title: str, steps: Sequence[StepRange]) -> None:
    lowest, highest, lowest_code, highest_code = zip(*steps, strict=True)
    numbers = range(len(steps))
    label = "values of the batch,\nfrom lowest to highest"
    axes.fill_between(numbers, lowest, highest, color=_BLUE, alpha=0.35, linewidth=0, label=label)
    axes.plot(numbers, lowest_code, color=_RED, linewidth=1.6, label="values of the lowest\nand highest code")
    axes.plot(numbers, highest_code, color=_RED, linewidth=1.6)
    _label(axes, title, "value")


def _label(axes: Axes, title: str, vertical: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step", fontsize=10, color=_GREY)
    axes.set_ylabel(vertical, fontsize=10, color=_GREY)
    axes.tick_params(labelsize=9, colors=_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(x=0)
