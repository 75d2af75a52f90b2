"""A vLLM plugin that serves models from a KV cache whose layers are stored at the bit widths of a precision profile."""

__version__ = "0.1.0"
