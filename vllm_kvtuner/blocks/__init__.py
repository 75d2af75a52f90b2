"""What vLLM's block pool holds: groups, managers and allocation of packed pages, windows and states."""
