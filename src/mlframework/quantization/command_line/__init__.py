"""The command ``mlframework-quantization``: what is in a file, how it compares, its encodings, and a demonstration."""
