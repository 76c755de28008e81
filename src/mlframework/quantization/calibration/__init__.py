"""Post-training quantization: statistics, scales and weights from a few batches, without training."""
