"""Mixed widths by ``assign_bits`` with 5 bits to a weight on average, beside 6 bits for every weight.

python benchmarks/mixed_widths.py --network minilm

Activations have 8 bits. Nothing is trained; weights are rounded to the nearest, and by ``round_weights``. The
sensitivity of weights is measured on the calibration batches.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from torch import nn

from mlframework.quantization import QATConfig, analyze_sensitivity, assign_bits, calibrate, prepare

from . import SIGNAL_TO_NOISE, STUDIES, Study, study
from .runs import converts_exactly

WIDTHS = (8, 7, 6, 5, 4, 3)
AVERAGE_BITS = 5
UNIFORM_BITS = 6


def quantized(network: Study, config: QATConfig, method: tuple[str, ...] = ()) -> nn.Module:
    """The network, prepared and calibrated."""
    model = prepare(network.model(), config, network.example_inputs)
    calibrate(model, network.calibration_batches(), method=method)
    return model.eval()


def result(network: Study, config: QATConfig, method: tuple[str, ...]) -> str:
    """Its metrics, of a model that converts to the same bits."""
    model = quantized(network, config, method)
    if not converts_exactly(model, network):
        raise RuntimeError(f"{network.title}: prepared and converted model differ")
    metrics = network.evaluate(model)
    headline = next(iter(metrics.values()))
    return f"{headline:.4f} / {metrics[SIGNAL_TO_NOISE]:.2f} dB"


def main() -> None:
    """Measures the networks, and writes the section."""
    from columns import ColumnsByKind  # of the benchmarks' folder, which is on the path where one of them is run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(STUDIES), default=["efficientnet", "minilm"])
    parser.add_argument("--batches", type=int, help="calibration batches to measure sensitivity on (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    section = ColumnsByKind("mixed-widths", ("network", "widths of weights", "method"))
    for name in options.network:
        network = study(name)
        started = time.process_time()
        batches = network.calibration_batches()[: options.batches]
        sensitivity = analyze_sensitivity(quantized(network, QATConfig()), batches, WIDTHS, activations=False)
        assignment = assign_bits(sensitivity, average_bits=AVERAGE_BITS)
        console.print(str(assignment), f"{time.process_time() - started:.0f} s of processor time")
        for method in ((), ("round_weights",)):
            for title, config in (
                (f"assigned, {AVERAGE_BITS} on average", assignment.configured(QATConfig())),
                (f"{UNIFORM_BITS} everywhere", QATConfig(weight_bits=UNIFORM_BITS)),
                (f"{AVERAGE_BITS} everywhere", QATConfig(weight_bits=AVERAGE_BITS)),
            ):
                cell = result(network, config, method)
                section.set((network.title, title, ", ".join(method) or "none"), cell)
                console.print(network.title, title, method, cell)
    section.write(
        "Mixed widths",
        (
            "`python benchmarks/mixed_widths.py`: weights of the widths that `assign_bits` gives, beside one width for",
            "all; activations of 8 bits, not trained, prepared and converted bit for bit the same. A cell gives the",
            "headline metric of the network and the signal-to-noise ratio of its outputs. The sensitivity of",
            "EfficientNet-Lite0 was measured on one batch of 16, and that of MiniLM at 4 bits and more.",
        ),
    )
