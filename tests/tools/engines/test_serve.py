"""One engine of ``kvtuner bench serve`` on a tiny model."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from kvtuner_tools.bench.points import Point, ThroughputPoint
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.serve import (
    ServeJob,
    decode_point,
    refuse_another_decode_kernel,
    throughput_point,
    token_range,
)
from tests.helpers.engine import VOCABULARY, cpu_only, fork_server
from tests.helpers.tiny_model import make_tiny_model


def _real(model: Path, lines: Path) -> tuple[dict, dict]:
    from vllm import LLM

    llm = LLM(
        str(model), kv_cache_dtype="kvtuner", additional_config={"kvtuner_profile": "K4V4"}, dtype="float32",
        enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=4,
        kv_cache_memory_bytes=4 << 20, disable_log_stats=False,
    )  # fmt: skip
    job = ServeJob(
        model=model, vocab_size=VOCABULARY, setting=CacheSetting("kvtuner", "K4V4"), points=(), output_tokens=1,
        throughput=(), window_s=1.0, long_prefill=None, memory=0.0, kv_memory_bytes=None, max_model_len=512,
        max_num_seqs=4, lines=lines,
    )  # fmt: skip
    try:
        tokens = token_range(VOCABULARY)
        return throughput_point(llm, job, ThroughputPoint(24, 8), *tokens), decode_point(llm, Point(3, 40), 8, *tokens)
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.engine
@cpu_only
def test_a_real_engine(tmp_path):
    model = make_tiny_model(tmp_path / "llama", "llama")
    with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
        result, decode = pool.submit(_real, model, tmp_path / "lines").result()

    assert result["fitting"] > result["concurrency"] == 4
    assert result["preemptions"] == 0
    assert result["window_s"] == pytest.approx(1.0, abs=0.7)
    assert result["repeat_tok_s"] > 0
    # A prompt for every 8 tokens, up to what is on its way at the window's two ends.
    tokens = result["output_tok_s"] * result["window_s"]
    assert result["prompts"] == pytest.approx(tokens / 8, abs=5)
    assert result["total_tok_s"] * result["window_s"] == pytest.approx(tokens + 24 * result["prompts"], rel=0.01)

    assert (decode["batch"], decode["context"]) == (3, 40)
    assert decode["decode_tok_s"] == pytest.approx(3e3 / decode["decode_ms"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "capability", "served", "refused"),
    [
        ("fp8@FLASHINFER", 90, False, True),
        ("fp8@FLASHINFER", 90, True, False),
        ("fp8@FLASHINFER", 120, False, True),
        ("fp8@FLASHINFER", 80, False, False),
        ("fp8@FLASH_ATTN", 90, False, False),
        ("fp8", 90, False, False),
    ],
)
def test_another_decode_kernel_does_not_stand_in_for_xqa(setting, capability, served, refused, monkeypatch):
    import vllm.platforms
    import vllm.utils.flashinfer

    class Card:
        is_device_capability = staticmethod(capability.__eq__)
        is_device_capability_family = staticmethod(capability.__eq__)

    monkeypatch.setattr(vllm.platforms, "current_platform", Card())
    monkeypatch.setattr(vllm.utils.flashinfer, "supports_trtllm_attention", lambda: served)
    if not refused:
        return refuse_another_decode_kernel(CacheSetting.parse(setting))
    with pytest.raises(ValueError, match=r"fp8@FLASHINFER: vLLM must decode by XQA.*VLLM_HAS_FLASHINFER_CUBIN=1"):
        refuse_another_decode_kernel(CacheSetting.parse(setting))
