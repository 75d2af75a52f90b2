"""Kernels in CUDA C++, compiled at run time by NVRTC for the card at hand; no compiler of the user's is needed."""
