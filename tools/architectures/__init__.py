"""The made table of architectures: tiny random models of everything that vLLM registers, run beside its own cache."""
