"""How much of a model is quantized: the share of its weights, and of its multiply-adds on the example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .report import ALONE, SKIPPED, UNCALLED, PreparationReport, ReportEntry, Share


class Work(NamedTuple):
    """Multiply-adds of one call: of all the model, and of each module by name with what it calls."""

    total: int
    of_module: dict[str, int]


def counted(model: nn.Module, run: Callable[[], Any]) -> Work:
    """Runs ``run``, which calls ``model``, and counts what it multiplies: products of matrices and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    # PyTorch's counter knows the attention operators of GPUs.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
    of_module: Counter[str] = Counter()
    started: list[int] = []
    hooks: list[Any] = []
    for name, module in model.named_modules():

        def before(module: nn.Module, args: Any) -> None:
            started.append(counter.get_total_flops())

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            of_module[name] += (counter.get_total_flops() - started.pop()) // 2

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, which is not counted
    try:
        with counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    total = counter.get_total_flops() // 2
    return Work(total, {**of_module, "": total})


def _attention_flops(query: Any, key: Any, value: Any, *options: Any, **others: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def multiply_adds_of(kind: type[nn.Module], weight: torch.Size, input: torch.Size, output: torch.Size) -> int:
    """Of one call of a layer of a kind, from the shapes."""
    return (input if kind is nn.ConvTranspose2d else output).numel() * weight.numel() // weight[0]


def with_work(entries: Iterable[ReportEntry], work: Work) -> list[ReportEntry]:
    """The entries with what their modules multiply, beside what entries of modules inside of them do; a layer wrapped
    alone that nothing calls is not quantized."""
    entries = list(entries)
    names = {entry.name for entry in entries}
    found = []
    for entry in entries:
        own = work.of_module.get(entry.name, entry.multiply_adds)
        prefix = f"{entry.name}." if entry.name else ""
        inside = [name for name in names if name.startswith(prefix) and name != entry.name and name in work.of_module]
        own -= sum(work.of_module[name] for name in inside if not any(name.startswith(f"{other}.") for other in inside))
        entry = replace(entry, multiply_adds=max(own, 0))
        if ALONE in entry.detail and entry.name not in work.of_module:
            entry = replace(entry, quantized=False, detail=UNCALLED)
        found.append(entry)
    return found


def shares(
    model: nn.Module, entries: Collection[ReportEntry], read: Collection[str], unread: Collection[str], work: Work
) -> tuple[Share, Share]:
    """Of weights (parameters of two and more axes) and of multiply-adds, without what the configuration skips.

    Args:
        model: the float model.
        entries: of all that was quantized or skipped.
        read, unread: names of parameters that functions take as weights, quantized or skipped.
        work: of the example.
    """
    quantized = {entry.name for entry in entries if entry.quantized}
    skipped = {entry.name for entry in entries if entry.detail.startswith(SKIPPED)}
    counted_weights: dict[int, bool] = {}
    sizes: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if parameter.dim() < 2 or not parameter.is_floating_point() or owner in skipped or name in unread:
            continue
        sizes[id(parameter)] = parameter.numel()
        counted_weights[id(parameter)] = counted_weights.get(id(parameter), False) or owner in quantized or name in read
    weights = Share(sum(sizes[key] for key, value in counted_weights.items() if value), sum(sizes.values()))
    multiplied = sum(entry.multiply_adds for entry in entries if entry.quantized)
    left_out = sum(entry.multiply_adds for entry in entries if entry.name in skipped)
    return weights, Share(multiplied, max(work.total - left_out, multiplied))


def warning_of(report: PreparationReport) -> str | None:
    """What to warn of where less than half of the weights or of the multiply-adds is quantized; None elsewhere."""
    if report.weights.fraction >= 0.5 and report.multiply_adds.fraction >= 0.5:
        return None
    causes: dict[tuple[str, str], list[ReportEntry]] = {}
    for entry in report.left_float:
        if not entry.detail.startswith(SKIPPED):
            cause, _, _ = entry.detail.partition(", read as ")
            causes.setdefault((entry.kind, cause), []).append(entry)
    largest = sorted(
        causes.items(), key=lambda item: (sum(e.multiply_adds for e in item[1]), len(item[1])), reverse=True
    )
    texts = [
        f"{entries[0].name or 'the model'}{f' and {len(entries) - 1} more' if entries[1:] else ''} ({kind}): {cause}"
        for (kind, cause), entries in largest[:3]
    ]
    return (
        f"only {report.shares} are quantized; float: {'; '.join(texts) or 'what is no layer'}. "
        "preparation_report(model) tells of each"
    )
