"""What a method changed, and what it left as it was, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MethodReport:
    """Layers (or pairs of what feeds and what reads) by name.

    Attributes:
        method: the function.
        changed: what it changed, in the order in which layers run.
        left_out: what it could not change, with the reason.

    Example:
        >>> report = MethodReport("correct_bias", ["conv"], {"head": "it has no bias"})
        >>> print(report)
        correct_bias: 1 changed, 1 left out
          head: it has no bias
    """

    method: str
    changed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, reason: str | None) -> None:
        """Notes one layer: changed if there is no reason against it."""
        if reason is None:
            self.changed.append(name)
        else:
            self.left_out[name] = reason

    def __str__(self) -> str:
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        lines = [f"{self.method}: {len(self.changed)} changed{left_out}"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.left_out.items())])
