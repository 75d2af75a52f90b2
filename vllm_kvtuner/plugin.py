"""vLLM's way in: the entry point of the group ``vllm.general_plugins``.

``register`` runs in every vLLM process, before vLLM builds its argument parser. It changes nothing of what a run
without ``--kv-cache-dtype kvtuner`` does.
"""


def register() -> None:
    """May run any number of times in a process."""
    # vLLM imports this module in every process to find out about it, and calls it only where plugins are wanted.
    from vllm_kvtuner import compat

    compat.apply()
