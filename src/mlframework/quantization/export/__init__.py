"""From a converted model to a file that a deployment engine runs: standard ONNX, quantize and dequantize around every
operation, and the same integers out of it."""
