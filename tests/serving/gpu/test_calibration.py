"""Calibration on a GPU: a trial by switching gives what ``kvtuner evaluate`` gives for the profile served."""

import pytest
import torch

from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.calibration import CacheRoom, CalibrationEngine, ModelTransforms
from kvtuner_tools.evaluate import EvaluationRequest, evaluate
from kvtuner_tools.heldout import load_windows
from tests.helpers.tiny_model import make_tiny_model, make_tokenizer
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.profile import TransformSettings

pytestmark = pytest.mark.gpu

PAIRS = ("K8V4", "K4V2", "K2V8", "K4V4")
ROTATED = TransformSettings(key_hadamard=True, value_hadamard=True, range_search=True)
TOLERANCE = 0.02
"""Relative. The same kernels run on the same bytes; another choice of matrix multiplication may round otherwise."""


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_trial_equals_the_served_profile(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    head_size = {"llama": 128, "gemma3": 64}[architecture]
    model = str(make_tiny_model(tmp_path / "model", architecture, head_size=head_size))
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog; " * 60)
    profile = tmp_path / "profile.yaml"
    layers = ", ".join(f"{layer}: {pair}" for layer, pair in enumerate(PAIRS))
    switches = ", ".join(f"{name}: true" for name in ROTATED.names)
    profile.write_text(f"version: 1\nlayers: {{{layers}}}\ntransforms: {{{switches}}}\n")
    memory = 64 << 20
    settings = (CacheSetting("kvtuner", "K8V8:plain"), CacheSetting("kvtuner", str(profile)))
    served = evaluate(
        EvaluationRequest(model, settings, data, tokens=1200, context=400, kv_memory_bytes=memory, chunk=128)
    )["settings"]
    windows = load_windows(data, make_tokenizer(), tokens=1200, context=400)

    with CalibrationEngine(model, windows, room=CacheRoom(kv_memory_bytes=memory), chunk=128) as engine:
        plain = engine.score(dict.fromkeys(range(4), PrecisionPair(8, 8)))
        engine.set_transforms(ModelTransforms(ROTATED))
        mixed = engine.score({layer: PrecisionPair.parse(pair) for layer, pair in enumerate(PAIRS)})
        engine.set_transforms(ModelTransforms())
        again = engine.score(dict.fromkeys(range(4), PrecisionPair(8, 8)))

    assert plain.kl_mean == pytest.approx(served[0]["kl_mean"], rel=TOLERANCE)
    assert mixed.kl_mean == pytest.approx(served[1]["kl_mean"], rel=TOLERANCE)
    assert mixed.kl_mean > 10 * plain.kl_mean
    assert again.kl_mean == pytest.approx(plain.kl_mean, rel=1e-6)


def test_two_engines_share_the_gpu(tmp_path, monkeypatch):
    """By its default vLLM refuses a GPU that is not nearly free."""
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    model = str(make_tiny_model(tmp_path / "model", "llama", head_size=128))
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog; " * 60)
    windows = load_windows(data, make_tokenizer(), tokens=400, context=400)
    pairs = dict.fromkeys(range(4), PrecisionPair(4, 4))
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - total // 4), dtype=torch.uint8, device="cuda")

    with (
        CalibrationEngine(model, windows, room=CacheRoom(kv_memory_bytes=64 << 20)) as one,
        CalibrationEngine(model, windows, room=CacheRoom(kv_memory_bytes=64 << 20)) as other,
    ):
        assert one.score(pairs).kl_mean == pytest.approx(other.score(pairs).kl_mean, rel=1e-6)
    assert held.numel() > 0
