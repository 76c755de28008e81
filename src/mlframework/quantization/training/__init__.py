"""Training that recovers what quantization took: distillation, fine-tuning, weights that oscillate, and recipes."""
