"""What was measured on a GPU as a short table, and as a section of RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .record import WORKLOAD, Target

Result = dict[str, Any]


def table(result: Result) -> str:
    """What was asked for beside what was measured, how each part ended, and what failed."""
    rows = [(name, asked, measured, "yes" if met else "NO") for name, asked, measured, met in _asked(result)]
    failed = [test for test in result["tests"] if test["outcome"] == "failed"]
    return "\n".join(
        [
            _facts_line(result),
            "",
            *_aligned([("asked for", "asked", "measured", "met"), *rows]),
            "",
            *_aligned([("part", "ended", "seconds", "tests"), *_parts(result)]),
            "",
            *(f"FAILED {test['name']}: {test['reason']}" for test in failed),
            *(f"did not run: {each['part']}, {each['name']}: {each['value'][:160]}" for each in result["failures"]),
        ]
    )


def section(result: Result) -> str:
    """The section of RESULTS.md."""
    lines = [
        f"## On a GPU: {result['facts'].get('card', 'unknown')}",
        "",
        "`make gpu`: bit equality with the CPU, then times by the device's own events, contenders taken in turns.",
        "Steps are those of training under bfloat16 autocast, with SGD and momentum; the ratios are to the same step",
        "without QAT, and in inference to bfloat16 compiled with mode reduce-overhead. Captured: as one CUDA graph,",
        f"without the time of Python. {_facts_line(result)}",
        "",
        *(f"- {name}: {value}" for name, value in result["facts"].items() if name.startswith(WORKLOAD)),
        *_tests_lines(result),
        "",
        "| what was asked for | asked | measured | met |",
        "|---|---|---|---|",
        *(f"| {name} | {asked} | {value} | {'yes' if met else 'no'} |" for name, asked, value, met in _asked(result)),
        "",
        "| measured | |",
        "|---|---|",
        *(f"| {each['name']} | {_number(each)} |" for each in result["figures"] if each["asked"] is None),
    ]
    unmeasured = [f"| {each['name']} | {each['value']} |".replace("\n", " ") for each in result["failures"]]
    if unmeasured:
        lines += ["", "| did not run | why |", "|---|---|", *unmeasured]
    return "\n".join(lines)


def _facts_line(result: Result) -> str:
    facts = result["facts"]
    names = ("torch", "triton", "python", "CUDA", "driver", "kernels on the device", "kernels on the CPU")
    known = [f"{name} {facts[name]}" for name in names if name in facts]
    return f"{facts.get('card', 'unknown card')}; {', '.join(known)}."


def _tests_lines(result: Result) -> Iterator[str]:
    for part in ("operators", "models", "training"):
        tests = [test for test in result["tests"] if test["part"] == part]
        failed = sum(test["outcome"] == "failed" for test in tests)
        skipped = sum(test["outcome"] == "skipped" for test in tests)
        yield f"- tests of {part}: {len(tests) - failed - skipped} passed, {failed} failed, {skipped} skipped"
        measured: dict[str, float] = {}
        for test in tests:
            for name, value in test.get("measured", {}).items():
                measured[name] = max(value, measured.get(name, 0.0))
        yield from (f"  - {name}: {value:.2g}" for name, value in measured.items())


def _asked(result: Result) -> Iterator[tuple[str, str, str, bool]]:
    for figure in result["figures"]:
        if figure["asked"] is not None:
            target = Target(**figure["asked"])
            yield figure["name"], str(target), f"{figure['value']:.3g}", target.is_met(figure["value"])


def _parts(result: Result) -> Iterator[tuple[str, str, str, str]]:
    for part in result["parts"]:
        outcomes = [test["outcome"] for test in result["tests"] if test["part"] == part["name"]]
        counts = ", ".join(f"{outcomes.count(each)} {each}" for each in dict.fromkeys(sorted(outcomes)))
        yield part["name"], part["status"], f"{part['seconds']:.0f}", counts


def _number(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.4g} {figure['unit']}".strip()


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
