"""OpenVINO: signed activations but for those that are never negative."""

from __future__ import annotations

from .target import NON_NEGATIVE, SYMMETRIC_SIGNED, Conventions, Target

TARGET = Target(SYMMETRIC_SIGNED, NON_NEGATIVE, conventions=Conventions(unsigned_concatenations=True))
