"""Gemma 4, whose full layers have heads of 512 and fewer KV heads than its sliding ones, here of 80, in float32."""

from tests.helpers.engine import cpu_only, run_engine
from tests.helpers.tiny_model import make_tiny_model
from tests.serving.cpu.test_architectures import decode_and_prefill, divergences

pytestmark = cpu_only

PROFILE = "version: 1\nlayers: {0: K8V4, 1: K8V8}\nattend_cached_prefill: true\ntransforms: {key_hadamard: true}\n"
KL = 1.1e-2
"""Bound of the mean from auto, in nats per token; measured 7.5e-3."""


def test_gemma4(prompts, tmp_path):
    """Prompts of several chunks, and decodes, with block rotations of 16 and a whole one of 512."""
    model = make_tiny_model(tmp_path / "model", "gemma4", num_layers=2, hidden_size=320, head_size=80)
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    run = run_engine(model, decode_and_prefill(prompts[2:]), profile=profile, max_num_batched_tokens=144)
    assert max(divergences(model, prompts[2:], run)) < KL
    # 128 tokens of 2 KV heads of 80 + 40 bytes of codes, and of one of 1,024, each with 8 bytes of scales and minima.
    assert run.page_bytes == (128 * 2 * 128, 128 * 1032)
