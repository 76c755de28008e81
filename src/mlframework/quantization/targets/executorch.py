"""ExecuTorch with its XNNPACK delegate."""

from __future__ import annotations

from dataclasses import replace

from .xnnpack import XNNPACK

TARGET = replace(XNNPACK, file_format="pte")
