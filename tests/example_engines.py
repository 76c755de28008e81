"""The engines that tests of models run for: of those that compute alike, one."""

from __future__ import annotations

from dataclasses import replace

from mlframework.quantization.targets import TARGETS

# LiteRT is ExecuTorch but for its files.
assert TARGETS["litert"] == replace(TARGETS["executorch"], file_format="tflite", has_dynamic_shapes=False)
ENGINES = [name for name in TARGETS if name != "litert"]
