"""Offline tools of vllm_kvtuner, installed as ``kvtuner_tools``; ``kvtuner`` on the command line."""
