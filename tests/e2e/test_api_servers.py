"""Several API servers before one engine, as vLLM starts them with data parallelism too, each a process of its own."""

from tests.helpers.server import serving

PROFILE = "smollm2_135m_window_5.50bit"


def test_each_knows_the_profile_and_their_metrics_are_one(smollm2, tmp_path):
    arguments = ["--kv-cache-dtype", "kvtuner", "--kvtuner-profile", PROFILE, "--api-server-count", "2"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    arguments += ["--kv-cache-memory-bytes", str(64 << 20)]
    with serving(smollm2, tmp_path / "log", arguments) as server:
        # A metric's lines of all processes would add up.
        assert server.metric("vllm:kvtuner_stored_bits") == 5.5
        assert server.metric("vllm:kvtuner_layers") == 30
        assert server.metric_label("vllm:kvtuner_profile_info", "profile") == PROFILE
