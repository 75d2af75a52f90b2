"""Limits that kernels, their callers and the engine's checks share."""

MAX_DECODE_QUERY_LEN = 16
"""Query tokens per request that the decode kernel takes; longer verifications of speculated tokens are refused."""
SHORT_PREFILL_TOKENS = 256
"""Query tokens of a batch's short prefills that the decode kernel takes besides the decodes."""
