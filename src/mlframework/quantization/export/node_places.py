"""Where in a user's model an operation of a program comes from, for errors and warnings."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

from .. import arithmetic

_NOT_THE_USERS = tuple(str(Path(str(module.__file__)).parent) for module in (torch, arithmetic))


def place_of(node: fx.Node) -> str:
    """An operator, with the module that calls it and, where it is known, the user's line of code."""
    owners = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path and "hook" not in path]
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in lines if not file.startswith(("<", *_NOT_THE_USERS))]
    line = f" ({own[-1][0]}:{own[-1][1]})" if own else ""
    return f"{_name_of(node)} in {owners[-1] if owners else 'the model'}{line}"


def _name_of(node: fx.Node) -> str:
    """An operator's name without the schema that ExecuTorch's have in theirs."""
    return re.sub(r"^<EdgeOpOverload: (\S+)>.*", r"\1", str(node.target))
