"""Imported once by the server that engines' processes are forked from, so that each costs its own set-up alone."""

import gc

import vllm.entrypoints.llm
import vllm.plugins
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker

import kvtuner_tools.architectures.trial  # noqa: F401

vllm.plugins.load_general_plugins()
# A full collection over vLLM's modules costs an engine seconds; what the server has imported is never garbage.
gc.freeze()
