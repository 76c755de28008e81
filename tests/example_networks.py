"""The zoo's networks, for tests that take each of them: those made of the blocks of another one are for long tests."""

from __future__ import annotations

from typing import Any

import pytest

from zoo import NETWORKS

# Of resnet20 with other widths, of gpt_tied, of vit, and of mobilenet_v2.
OF_SAME_BLOCKS = {"resnet18", "transformers_resnet", "gpt", "transformers_vit", "transformers_mobilenet_v2"}


def named(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.long if name in OF_SAME_BLOCKS else ())


EVERY_NETWORK = pytest.mark.parametrize("name", [named(name) for name in NETWORKS])
