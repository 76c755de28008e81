"""TensorRT: symmetric activations throughout."""

from __future__ import annotations

from .target import SYMMETRIC_SIGNED, Conventions, Target

TARGET = Target(SYMMETRIC_SIGNED, SYMMETRIC_SIGNED, conventions=Conventions(own_nodes_for_sums=True))
