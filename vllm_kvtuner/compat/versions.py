"""The vLLM versions that this release serves. Reads nothing of vLLM's, so that it works where none is installed."""

SERVED_VERSIONS: dict[str, tuple[str, ...]] = {"cpu": ("0.32.0",), "cuda": ("0.33.0",)}
"""vLLM's versions, oldest first, by the kind of device that its build serves."""
