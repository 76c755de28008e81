"""ONNX Runtime: unsigned activations, and files that compute the integers that the converted model computes."""

from __future__ import annotations

from .target import AFFINE_UNSIGNED, NON_NEGATIVE, Conventions, Target

TARGET = Target(AFFINE_UNSIGNED, NON_NEGATIVE, conventions=Conventions(exact=True))
