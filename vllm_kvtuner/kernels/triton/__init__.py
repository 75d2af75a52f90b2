"""Kernels in Triton, the portable ones."""
