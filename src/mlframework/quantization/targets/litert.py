"""LiteRT (TensorFlow Lite) with the XNNPACK delegate that it has by default."""

from __future__ import annotations

from dataclasses import replace

from .xnnpack import XNNPACK

TARGET = replace(XNNPACK, file_format="tflite", has_dynamic_shapes=False)
