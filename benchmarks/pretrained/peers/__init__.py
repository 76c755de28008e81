"""Other libraries as methods, each set up as its own documents say; a file for each."""

from __future__ import annotations

from ..methods import Method

PEERS: dict[str, Method] = {}
