"""One engine of one tiny model: what it answers, or why it does not start. Meant for a process of its own."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, EngineArgs, SamplingParams
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.kv_cache_interface import MambaSpec

from kvtuner_tools.architectures.configs import FIRST_SPECIAL_TOKEN, MAX_MODEL_LEN
from kvtuner_tools.architectures.weights import LOAD_FORMAT
from vllm_kvtuner.attention.impl import KVTunerImpl
from vllm_kvtuner.engine.config import RECENT_SUFFIX
from vllm_kvtuner.profile.problems import ProfileError

FIRST_TOKEN = 3
"""Ids below are left to the configurations' ends of texts."""
PROMPT_LENGTHS = (24, 150, 61)
NEW_TOKENS = 16
CHUNK = 64
"""Prompt tokens of a step at most, so that most of the prompts' tokens read others back from the cache."""
KV_CACHE_BYTES = 32 << 20
ENGINE_ARGUMENTS = {"enable_prefix_caching": False}
"""What checks without an engine are told too: vLLM's CPU kernels keep no states of Mamba-2 for a prefix cache."""
BROKEN_STEP = 8
"""Of so many slots, a broken cache has one wrong."""


_alive: list[LLM] = []
"""Keeps the engine from being taken down in order, which takes as long as its answers: its process ends anyway."""


@dataclass(frozen=True)
class Job:
    """What an engine's process gets.

    Args:
        architecture: as vLLM registers it.
        model: the tiny model's folder.
        profile: pair or file; None for vLLM's own cache.
        dtype: of the model, as vLLM takes it.
        scored: texts to score after the answers, which are then scored too, behind them.
        only_config: do not build the engine, but only its configuration, with pictures and sounds allowed.
        also_broken: answer once more, with a cache that stores some values of one layer wrongly, which must show.
    """

    architecture: str
    model: str
    profile: str | None = None
    dtype: str = "float32"
    scored: tuple[tuple[int, ...], ...] = ()
    only_config: bool = False
    also_broken: bool = False


@dataclass(frozen=True)
class Answer:
    """A prompt, continued.

    Args:
        text: token ids of both.
        logprobs: [tokens - 1, vocabulary] float32.
    """

    text: tuple[int, ...]
    logprobs: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Run:
    """What an engine's process gives.

    Args:
        error: the refusal, or what ended the engine; None where it answered.
        refused: whether our own checks refused it, which they do before any weight is loaded.
        answers: to the prompts.
        broken: to the same, with a broken cache.
        scores: log-probabilities of each scored text, [tokens - 1, vocabulary] float32.
        packed: names of the decoder's attention layers whose pages are packed.
        unpacked: of those with other pages.
    """

    error: str | None = None
    refused: bool = False
    answers: tuple[Answer, ...] = ()
    broken: tuple[Answer, ...] = ()
    scores: tuple[np.ndarray, ...] = field(default=(), repr=False)
    packed: tuple[str, ...] = ()
    unpacked: tuple[str, ...] = ()


def prompts() -> list[tuple[int, ...]]:
    """Random texts, of ids that no configuration takes for an image or an end."""
    numbers = np.random.default_rng(0)
    return [tuple(numbers.integers(FIRST_TOKEN, FIRST_SPECIAL_TOKEN, length).tolist()) for length in PROMPT_LENGTHS]


def run(job: Job) -> Run:
    """Build the engine, and let it answer."""
    try:
        # Loaded here, the class is inspected here; otherwise vLLM starts a process to do so, which imports vLLM anew.
        ModelRegistry.register_model(job.architecture, ModelRegistry.models[job.architecture].load_model_cls())
        if job.only_config:
            EngineArgs(**_options(job)).create_engine_config()
            return Run()
        return _live(job)
    except ProfileError as error:
        return Run("; ".join(error.problems), refused=True)
    except Exception as error:
        return Run(_reason(error))


def _reason(error: BaseException) -> str:
    """An error's kind and first line, or where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError" and len(lines) > 1:  # pydantic's first line counts errors
        lines = lines[1:]
    if not lines:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        lines = [f"in {frame.name} of {Path(frame.filename).name}, line {frame.lineno}"]
    return f"{type(error).__name__}: {lines[0]}"


def _options(job: Job) -> dict[str, Any]:
    return {
        "model": job.model,
        "kv_cache_dtype": "auto" if job.profile is None else "kvtuner",
        "additional_config": {} if job.profile is None else {"kvtuner_profile": job.profile},
        "load_format": LOAD_FORMAT,
        "skip_tokenizer_init": True,
        "dtype": job.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": len(PROMPT_LENGTHS),
        "max_num_batched_tokens": CHUNK,
        "max_logprobs": -1,
        "enforce_eager": True,
        **ENGINE_ARGUMENTS,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }


def _live(job: Job) -> Run:
    torch._dynamo.config.disable = True  # to compile the sampler's helpers takes longer than all answers
    llm = LLM(**_options(job), language_model_only=True)
    _alive.append(llm)
    layers = _attention_layers(llm)
    packed = {name: layer for name, layer in layers.items() if isinstance(layer.impl, KVTunerImpl)}
    answers = _answer(llm)
    scored = _generate(llm, [*job.scored, *(each.text for each in answers)], max_tokens=1) if job.scored else []
    broken: tuple[Answer, ...] = ()
    if job.also_broken and packed:
        _break(list(packed.values()))
        broken = _answer(llm)
    return Run(
        answers=answers,
        broken=broken,
        scores=tuple(_matrix(each.prompt_logprobs[1:]) for each in scored),
        packed=tuple(packed),
        unpacked=tuple(name for name in layers if name not in packed),
    )


def _answer(llm: LLM) -> tuple[Answer, ...]:
    ids = list(range(FIRST_TOKEN, FIRST_SPECIAL_TOKEN))
    found = []
    for output in _generate(llm, prompts(), logprobs=-1, max_tokens=NEW_TOKENS, allowed_token_ids=ids):
        answer = output.outputs[0]
        rows = [*output.prompt_logprobs[1:], *answer.logprobs]
        found.append(Answer((*output.prompt_token_ids, *answer.token_ids), _matrix(rows)))
    return tuple(found)


def _generate(llm: LLM, texts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
    options = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=-1, **sampling)
    return llm.generate([{"prompt_token_ids": list(text)} for text in texts], options, use_tqdm=False)


def _attention_layers(llm: LLM) -> dict[str, Any]:
    """Layers that have pages of keys and values of their own, by name."""
    core: Any = llm.llm_engine.engine_core
    specs = core.engine_core.model_executor.driver_worker.worker.model_runner.get_kv_cache_spec()
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {
        name: layers[name]
        for name, spec in specs.items()
        if not isinstance(spec, MambaSpec) and not name.endswith(RECENT_SUFFIX)
    }


def _break(layers: Sequence[Any]) -> None:
    """Let the middle one of the layers store some values with the wrong sign."""
    impl = layers[len(layers) // 2].impl
    store = impl.do_kv_cache_update

    def broken(layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        wrong = torch.zeros(len(value), 1, 1, dtype=torch.bool)
        wrong[: len(slots), 0, 0] = slots % BROKEN_STEP == 0
        store(layer, key, torch.where(wrong, -value, value), cache, slots)

    impl.do_kv_cache_update = broken


def _matrix(rows: Sequence[Mapping[int, Any]]) -> np.ndarray:
    """Rows of full log-probabilities, [rows, vocabulary]."""
    matrix = np.full((len(rows), len(rows[0])), -np.inf, np.float32)
    for index, row in enumerate(rows):
        for token, entry in row.items():
            matrix[index, token] = entry.logprob
    return matrix
