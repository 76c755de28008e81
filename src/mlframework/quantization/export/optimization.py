"""torch.onnx's optimization in linear time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_slow_rules() -> Iterator[None]:
    """Leaves out a rule that makes one split of two slices: for every node it goes through the whole graph, which takes
    as long as all other rules together, and longer in larger graphs. Engines run slices as well as splits."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import slice_split_rule

    rules = rewriter._DEFAULT_REWRITE_RULES  # there is no other way to choose what torch.onnx applies
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule is not slice_split_rule)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
