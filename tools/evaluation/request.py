"""What ``kvtuner evaluate`` is asked to measure."""

from dataclasses import dataclass, field
from pathlib import Path

from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engine_arguments import EngineWords
from kvtuner_tools.evaluation.needles import NeedleRequest
from kvtuner_tools.evaluation.quotes import QuoteRequest
from kvtuner_tools.simulation.rows import SimulationRequest
from kvtuner_tools.task_accuracy import DEFAULT_MAX_TOKENS

SCHEMA = "kvtuner-evaluation/2"
"""Of a result."""
DEFAULT_ANSWER_TOKENS = 16384
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        model: folder or model id.
        settings: what to compare with ``auto``, in order.
        data: plain text, or rows of JSON with texts or conversations; None takes the bundled held-out set.
        tokens: text tokens to run, at least; 0 for no text.
        context: tokens of a window at most.
        chunk: prompt tokens per engine step; below ``context``, later chunks attend to the earlier ones in the cache.
        kv_memory_bytes: KV cache memory of every engine, on each rank.
        dtype: bfloat16, float16 or float32, of the model and of the ``auto`` cache.
        noise_floor: also compare ``auto`` with itself, prefilled in two chunks so that it rounds differently.
        generate: answer the bundled questions, and measure KL along ``auto``'s answers to these and to ``task``.
        answer_tokens: tokens of ``auto``'s answers, together, that KL is measured along at most.
        temperature: of answers to questions; 0 takes the most likely token.
        needles: facts to find in long texts.
        quotes: sentences to repeat.
        task: rows of JSON with question and answer, to be answered by every setting and ``auto``.
        task_limit: questions of it, of the bundled ones, and of each lm-eval task, at most.
        num_fewshot: worked examples before each question: first rows of ``task``, which are not asked (by default
            none), and what lm-eval takes as such (by default as its tasks say).
        task_tokens: tokens an answer may have.
        lm_eval: names of lm-eval tasks, or YAML files of such.
        words: vLLM's engine arguments.
        simulation: caches to simulate beside ``settings``.
    """

    model: str
    settings: tuple[CacheSetting, ...]
    data: Path | None = None
    tokens: int = DEFAULT_TOKENS
    context: int = 1024
    chunk: int | None = None
    kv_memory_bytes: int = 1 << 30
    dtype: str = "bfloat16"
    noise_floor: bool = False
    generate: bool = False
    answer_tokens: int = DEFAULT_ANSWER_TOKENS
    temperature: float = 0.0
    needles: NeedleRequest | None = None
    quotes: QuoteRequest | None = None
    task: Path | None = None
    task_limit: int | None = None
    num_fewshot: int | None = None
    task_tokens: int = DEFAULT_MAX_TOKENS
    lm_eval: tuple[str, ...] = ()
    words: EngineWords = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise ValueError(f"--answer-tokens must be at least 1, but got {self.answer_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must be at least 0, but got {self.temperature}")

    simulation: SimulationRequest = field(default_factory=SimulationRequest)
