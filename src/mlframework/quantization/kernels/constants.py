"""What a compiler calls once, and takes the result of for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Marks a function as ``torch.compiler.assume_constant_result`` does, which would import the whole compiler."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
