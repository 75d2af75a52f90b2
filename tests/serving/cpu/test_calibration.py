"""Calibration mode: a switched engine measures what an engine serves that was built with the profile, bit for bit."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from kvtuner_tools import cli, processes
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.calibration.artifacts import Quality
from kvtuner_tools.calibration.options import CalibrationOptions, load_texts
from kvtuner_tools.calibration.outcome import Heldout
from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engines.evaluate import Asked, EngineOptions, MeasuringEngine, ReferenceLogits, Window
from kvtuner_tools.model_files import load_model_shape
from kvtuner_tools.task_accuracy import Completion
from tests.helpers.engine import KV_CACHE_BYTES, cpu_only, fork_server
from vllm_kvtuner.engine import checks
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.statics import FeedbackStatics, LayerStatics, save_statics

pytestmark = cpu_only

ROOM = "K8V8"
QWEN_PROFILES = {
    "mixed": "layers: {0: K8V4, 1: K2V8, 2: K4V2, 3: K2V2}",
    "transformed": (
        "layers: {0: K4V4, 1: K4V2, 2: K8V2, 3: K2V8}\n"
        "statics: statics.safetensors\n"
        "transforms:\n"
        "  {key_offset: true, key_equalization: true, key_hadamard: true, value_hadamard: true, range_search: true,\n"
        "  key_round_feedback: true, value_round_feedback: true,\n"
        "  overrides: {1: {key_offset: false, key_equalization: false}, 2: {value_hadamard: false}}}"
    ),
    "plain": "layers: K8V8",
}
RECENT = "recent_window: 32"
SINKS = f"{RECENT}\nsink_tokens: 4"


def recent_profiles(recent: str) -> dict[str, str]:
    return {
        "low": f"layers: {{0: K4V2, 1: K2V2, 2-3: K4V4}}\n{recent}",
        "transformed": f"layers: K4V2\ntransforms: {{key_hadamard: true, value_hadamard: true}}\n{recent}",
    }


GEMMA_ROOM = "layers: {0: K8V8, 1: K16V16, 2-3: K8V8}"
GEMMA_PROFILES = {
    "sliding-window layers below, one layer not quantized": "layers: {0: K4V2, 1: K16V16, 2: K8V4, 3: K4V4}",
    "full layer below": "layers: {0: K8V8, 1: K16V16, 2: K8V8, 3: K2V2}",
}
NUMBERS = random.Random(0)
WINDOWS = tuple(tuple(NUMBERS.randrange(10, 250) for _ in range(length)) for length in (300, 90))


CONTINUE = Asked((WINDOWS[0][:280],), max_tokens=12)
"""A prompt that begins as a window does, so the prefix cache may have it."""


@dataclass(frozen=True)
class Measured:
    """What one setting gave."""

    scores: TokenScores
    answers: tuple[Completion, ...]

    def equals(self, other: "Measured") -> bool:
        return self.answers == other.answers and all(
            np.array_equal(getattr(self.scores, name), getattr(other.scores, name)) for name in ("kl", "nll", "agree")
        )


def measure(
    model: Path,
    profile: Path | None,
    reference: ReferenceLogits | Path,
    switches: list[Path] | None = None,
    windows: tuple[tuple[int, ...], ...] = WINDOWS,
) -> tuple[list[Measured], ReferenceLogits]:
    """Build an engine and measure it, once or after each switch."""
    options = EngineOptions(
        label="test",
        model=str(model),
        dtype="float32",
        setting=CacheSetting("auto") if profile is None else CacheSetting("kvtuner", str(profile)),
        max_model_len=512,
        chunk=128,  # so that prefill also attends to earlier chunks
        kv_memory_bytes=KV_CACHE_BYTES,
        max_num_seqs=4,
        switchable=switches is not None,
    )
    with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
        return pool.submit(live, options, reference, switches, windows).result()


def live(options, reference, switches, windows):
    with open(os.devnull, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    engine = MeasuringEngine(options, reference)
    measured = []
    try:
        for switch in [None] if switches is None else switches:
            if switch is not None:
                engine.switch(load_profile(str(switch)).resolve(load_model_shape(options.model)))
            scores, reference = engine.run_windows([Window(window) for window in windows], progress=False)
            measured.append(Measured(scores, engine.answer(CONTINUE, progress=False)))
        return measured, reference
    finally:
        engine.close()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"version: 1\n{text}\n")
    return path


@pytest.mark.parametrize(
    ("architecture", "room", "profiles"),
    [
        ("qwen2", f"layers: {ROOM}", QWEN_PROFILES),
        ("gemma3", GEMMA_ROOM, GEMMA_PROFILES),
        ("llama", f"layers: {ROOM}\n{RECENT}", recent_profiles(RECENT)),
        ("llama", f"layers: {ROOM}\n{SINKS}", recent_profiles(SINKS)),
    ],
    ids=["qwen2", "gemma3", "recent windows", "sink tokens"],
)
def test_a_switched_engine_equals_the_served_profile(request, tmp_path, architecture, room, profiles):
    model = request.getfixturevalue(architecture)
    if architecture == "qwen2":
        random_statics(tmp_path / "statics.safetensors")
    files = [write(tmp_path, str(index), text) for index, text in enumerate(profiles.values())]
    _, reference = measure(model, None, tmp_path / "logits")

    switched, _ = measure(model, write(tmp_path, "room", room), reference, [*files, files[0]])

    kl = [each.scores.kl.mean() for each in switched]
    assert len(set(kl)) == len(files), "settings must differ for the comparison to mean anything"
    assert min(kl) > 1e-6
    for name, file, measured in zip(profiles, files, switched, strict=False):
        (served,), _ = measure(model, file, reference)
        assert served.equals(measured), name
    assert switched[-1].equals(switched[0])


def test_a_calibration_with_sink_tokens_ends_in_a_profile_that_serves_what_was_scored(llama, tmp_path, monkeypatch):
    # Engines in processes that are forked with vLLM imported.
    context = fork_server()
    monkeypatch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"Line {line} of the text says what line {line * 7 % 100} does not. " for line in range(60))
    )
    sizes = {"sequence-length": 96, "capture-tokens": 192, "search-tokens": 96, "heldout-tokens": 192, "trials": 1}
    options = {"data": text, "dtype": "float32", "kv-cache-memory-bytes": KV_CACHE_BYTES, "max-bits": 4.5, **sizes}
    options |= {"recent-window": 16, "sink-tokens": 4}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    out = tmp_path / "out"

    assert cli.main(["calibrate", str(llama), "--out", str(out), *arguments]) == 0
    profile = out / "profile.yaml"
    assert load_profile(str(profile)).sink_tokens == 4
    assert cli.main(["profile", "check", str(profile), "--model", str(llama)]) == 0

    tokenizer = AutoTokenizer.from_pretrained(llama)
    windows = load_texts(CalibrationOptions.read(out), tokenizer).heldout.windows
    _, reference = measure(llama, None, tmp_path / "logits", windows=windows)
    (served,), _ = measure(llama, profile, reference, windows=windows)
    scored = Heldout.read(out).chosen.quality
    assert Quality(**served.scores.summary(), num_tokens=len(served.scores.kl)) == scored
    profile.write_text(profile.read_text().replace("sink_tokens: 4\n", ""))
    (without,), _ = measure(llama, profile, reference, windows=windows)
    assert without.scores.kl.mean() != pytest.approx(scored.kl_mean, rel=1e-3), "sink tokens must matter here"


def random_statics(path: Path) -> None:
    """Of the transformed Qwen profile."""
    numbers = np.random.default_rng(0)
    factors = numbers.uniform(0.5, 2, (2, 32))

    def feedback(*transforms: str) -> FeedbackStatics:
        upper = np.triu(0.2 * numbers.normal(size=(2, 64, 64)), 1)
        return FeedbackStatics(upper + np.eye(64), {2: (0.8, 1.1), 4: (1.0,)}, transforms)

    def layer(index: int) -> LayerStatics:
        equalization = () if index == 1 else ("key_equalization",)
        return LayerStatics(
            key_offset=numbers.normal(size=(2, 64)).astype(np.float32),
            key_equalization=np.concatenate([factors, factors], axis=1).astype(np.float32),
            key_round_feedback=feedback(*equalization, "key_hadamard"),
            value_round_feedback=feedback(*(() if index == 2 else ("value_hadamard",))),
        )

    save_statics(path, {index: layer(index) for index in range(4)}, {})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("{0-2: K4V4, 3: K16V16}", r"layers\.3: must be quantized in this engine, but got K16V16"),
        ("{0: K4V4, 1: K8V8, 2: K4V4, 3: K4V4}", r"layers\.0: must be K16V16 in this engine, but got K4V4"),
        ("{0: K16V16, 1: K8V8, 2: K4V4, 3: K4V4}", r"layers\.1: must fit pages made for K4V4, but got K8V8"),
        (
            "{0: K16V16, 1-3: K4V4}\nrecent_window: 32",
            r"layers\.1: must have the recent window that this engine was built with \(none\), but got 32 tokens in 16",
        ),
        (
            "{0: K16V16, 1-3: K4V4}\nrecent_window: 32\nsink_tokens: 4",
            r"layers\.1: must have the recent window .* \(none\), but got 32 tokens and the first 4 in 16",
        ),
    ],
)
def test_what_the_pages_cannot_hold_is_refused(monkeypatch, layers, message, tmp_path, llama):
    from vllm_kvtuner.attention import switchable

    shape = load_model_shape(str(llama))
    first = "K16V16" if "0-2" not in layers else "K4V4"
    room = load_profile(str(write(tmp_path, "room", f"layers: {{0: {first}, 1-3: K4V4}}"))).resolve(shape)
    monkeypatch.setattr(switchable, "resolved_profile", lambda _: room)
    worker = type("Worker", (), {"vllm_config": None})

    with pytest.raises(ValueError, match=message):
        switchable.switch(worker, load_profile(str(write(tmp_path, "new", f"layers: {layers}"))).resolve(shape))


@pytest.mark.parametrize(("mode", "refused"), [("NONE", False), ("PIECEWISE", True), ("FULL_AND_PIECEWISE", True)])
def test_cuda_graphs_are_refused(mode, refused):
    """A graph would replay the pair it was captured with. vLLM's CPU build has none, so the check is called itself."""
    config = SimpleNamespace(
        additional_config={"kvtuner_calibration": True},
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(user_specified_block_size=False, kv_cache_dtype_skip_layers=[]),
        model_config=SimpleNamespace(is_mm_prefix_lm=False, hf_text_config=SimpleNamespace()),
        attention_config=SimpleNamespace(use_non_causal=False),
        diffusion_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=mode)),
        speculative_config=None,
        kv_transfer_config=None,
    )

    problems = checks.settings(config)

    assert len(problems) == refused
    assert all(
        line.startswith("cudagraph_mode must be NONE with kvtuner_calibration") and line.endswith(f"but got {mode}")
        for line in problems
    )
    config.additional_config = {}
    assert not checks.settings(config)
