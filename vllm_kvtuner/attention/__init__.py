"""vLLM's attention contract: backend, metadata, implementation, prefill and the recent window's cache."""
