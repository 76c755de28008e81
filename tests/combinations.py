"""Parametrization by all combinations of several values, of which the suite has half and the long tests the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest


def half_of_all(**arguments: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Each argument's values by what they are called.

    The suite has every second combination, so that of three arguments or more any two values meet in it; of two, the
    values of one come in turn with those of the other.
    """
    return pytest.mark.parametrize(
        tuple(arguments),
        [
            pytest.param(
                *(value for _, (_, value) in chosen),
                id="-".join(name for _, (name, _) in chosen),
                marks=pytest.mark.long if sum(index for index, _ in chosen) % 2 else (),
            )
            for chosen in itertools.product(*(list(enumerate(values.items())) for values in arguments.values()))
        ],
    )
