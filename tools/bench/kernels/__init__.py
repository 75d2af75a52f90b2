"""Attention kernels under one interface: this project's and vLLM's."""
