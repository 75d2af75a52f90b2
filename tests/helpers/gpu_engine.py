"""An engine on a GPU in the test's own process, and what counts as the same answers there."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch

TOKENS = 24
"""Of each answer, where nothing else is asked for."""
LOGPROB_TOLERANCE = 0.25
"""bf16 activations alone move a tiny random model's log-probabilities by up to about 0.05 between two kernels, which
batches of other shapes take too; an 8-bit cache adds less. A wrong position, mask, slot or scale moves them by whole
units."""
FULL_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Compilation without torch.compile, and CUDA graphs of whole decode steps."""

Answer = list[tuple[int, float]]
"""Each token of one answer and its log-probability."""


class Engine:
    """An engine until the block ends.

    Args:
        model: model folder.
        profile: of the kvtuner cache; None runs vLLM's own (``auto``).
        attend_cached_prefill: overrides the profile's, unless None.
        options: further keywords of LLM.
    """

    llm: Any

    def __init__(
        self,
        model: Path,
        profile: str | Path | None = "K8V8:plain",
        *,
        attend_cached_prefill: bool | None = True,
        **options: Any,
    ) -> None:
        additional: dict[str, Any] = {}
        if profile is not None:
            additional["kvtuner_profile"] = str(profile)
            if attend_cached_prefill is not None:
                additional["kvtuner_attend_cached_prefill"] = attend_cached_prefill
        self.arguments = {
            "model": str(model),
            "kv_cache_dtype": "auto" if profile is None else "kvtuner",
            "additional_config": additional,
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": 64 << 20,
            "compilation_config": FULL_GRAPHS,
            **options,
        }

    def __enter__(self) -> Self:
        from vllm import LLM

        self.llm = LLM(**self.arguments)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        torch.cuda.empty_cache()

    def ask(
        self, prompts: Sequence[Sequence[int]], tokens: int = TOKENS, adapter: str | None = None
    ) -> tuple[list[Answer], list[int]]:
        """Greedy answers, and how many tokens of each prompt a cache held.

        Args:
            prompts: token ids of each.
            tokens: of each answer.
            adapter: folder of a LoRA adapter, or None.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, ignore_eos=True)
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)
        samples = [output.outputs[0] for output in outputs]
        answers = [
            [(token, row[token].logprob) for token, row in zip(sample.token_ids, sample.logprobs, strict=True)]
            for sample in samples
        ]
        return answers, [output.num_cached_tokens for output in outputs]

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[list[float]]:
        """Log-probabilities of given answers, read as the ends of prompts."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
        inputs = [
            {"prompt_token_ids": [*prompt, *(token for token, _ in answer)]}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [
            [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[-len(answer) :]]
            for output, answer in zip(outputs, answers, strict=True)
        ]

    def counter(self, name: str) -> float:
        """Sum of a metric over its labels."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def on_ranks(self, read: Callable[[Any], Any]) -> list[Any]:
        """What ``read`` returns for the worker of each rank."""
        return self.llm.collective_rpc(read)

    def first_pages(self, tokens: int) -> dict[str, torch.Tensor]:
        """Each layer's pages of the first tokens of the first request, whose blocks are the first after the null one.

        Returns:
            [blocks, KV heads, tokens per block, bytes or numbers] by layer name, on the CPU.
        """
        block_size = self.llm.llm_engine.vllm_config.cache_config.block_size

        def read(worker: Any) -> dict[str, torch.Tensor]:
            return {
                name: layer.kv_cache[1 : 1 + tokens // block_size].cpu()
                for name, layer in attention_layers(worker).items()
            }

        (pages,) = self.on_ranks(read)
        return pages


def attention_layers(worker: Any) -> dict[str, Any]:
    """Layers of a worker's model that have a cache, by name."""
    layers = worker.model_runner.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if getattr(layer, "kv_cache", None) is not None}


def assert_alike(answers: Sequence[Answer], truth: Sequence[Answer], tolerance: float = LOGPROB_TOLERANCE) -> None:
    """The same tokens until two are nearly as good, and their log-probabilities."""
    for mine, expected in zip(answers, truth, strict=True):
        for (token, logprob), (other, other_logprob) in zip(mine, expected, strict=True):
            assert logprob == pytest.approx(other_logprob, abs=tolerance)
            if token != other:
                break
