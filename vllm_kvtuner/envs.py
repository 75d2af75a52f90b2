"""The environment variables of this package; nothing else reads os.environ."""

import os

DEFAULT_PREFILL_WORKSPACE_TOKENS = 65536


def profile() -> str | None:
    """KVTUNER_PROFILE: the profile for vLLM entry points that parse no flags of ours."""
    return os.environ.get("KVTUNER_PROFILE") or None


def prefill_workspace_tokens() -> int:
    """KVTUNER_PREFILL_WORKSPACE_TOKENS: cached tokens dequantized at once for prefill over a cached prefix.

    Raises:
        ValueError: not a positive integer.
    """
    name = "KVTUNER_PREFILL_WORKSPACE_TOKENS"
    text = os.environ.get(name)
    if text is None:
        return DEFAULT_PREFILL_WORKSPACE_TOKENS
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{name} must be a positive integer, but got {text!r}")
    return int(text)
