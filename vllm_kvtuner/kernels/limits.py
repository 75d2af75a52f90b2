"""Limits that kernels, their callers and the engine's checks share."""

MAX_DECODE_QUERY_LEN = 16
"""Query tokens per request that the decode kernel takes; longer verifications of speculated tokens are refused."""
SHORT_PREFILL_TOKENS = 256
"""Query tokens of a batch's short prefills that the decode kernel takes besides the decodes."""
UNSERVED_ON_GPUS = ("key_round_feedback", "value_round_feedback")
"""Transforms that no kernel on a GPU has yet: those take each number's nearest code. The reference has them."""
