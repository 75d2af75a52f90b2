"""Kernels on packed pages: the contract, its reference in torch, and its implementations in Triton and CUDA."""
