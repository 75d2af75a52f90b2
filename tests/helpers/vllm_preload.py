"""Imported once by the server that engines' processes are forked from."""

import gc

import vllm.entrypoints.llm
import vllm.model_executor.layers.quantization.online.base
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401

# A full collection over vLLM's modules costs an engine seconds; what the server has imported is never garbage.
gc.freeze()
