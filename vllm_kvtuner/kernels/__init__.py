"""Triton kernels on packed pages; reference.py defines each one under the same name plus ``_ref``."""
