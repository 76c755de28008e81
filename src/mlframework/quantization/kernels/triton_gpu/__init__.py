"""Kernels in Triton for NVIDIA GPUs: implementations of the operators that :mod:`..operators` declares.

Nothing here is imported before a GPU needs it but :mod:`.availability` and :mod:`.registration`, so that Triton is
optional. Every kernel computes the formulas of :mod:`mlframework.quantization.arithmetic` in their order, with division
rounded correctly and nothing contracted into fused multiply-adds, so that codes are those of the CPU bit for bit.
"""
