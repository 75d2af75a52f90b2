"""Which window a pair alone has, by how long requests are and what an engine serves."""

from types import SimpleNamespace

import pytest

from vllm_kvtuner.engine.pair_window import LONG_REQUEST, SHORT_REQUEST, choose_window, largest_share
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape

SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(8, 128),) * 32)


def engine(max_model_len, block_size=16, ranks=1, additional=None, **text):
    """An engine's configuration, as far as a window depends on it."""
    dtype = SimpleNamespace(itemsize=2)
    return SimpleNamespace(
        additional_config=additional or {},
        cache_config=SimpleNamespace(block_size=block_size),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(
            max_model_len=max_model_len, dtype=dtype, is_hybrid=False, hf_text_config=SimpleNamespace(**text)
        ),
        num_speculative_tokens=0,
    )


def nothing_refused(resolved):
    return ()


def chosen(config, spec="K4V4", shape=SHAPE, problems=nothing_refused):
    return choose_window(config, load_profile(spec), shape, problems)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("ranks", [1, 8])
def test_long_requests_have_the_best_window(block_size, ranks):
    assert chosen(engine(32_768, block_size, ranks)) == (64, 16, 4, "")


@pytest.mark.parametrize("spec", ["K4V4", "K4V2", "K2V2", "K8V4"])
@pytest.mark.parametrize("max_model_len", [1_024, 2_048, 8_192])
def test_short_requests_have_windows_of_few_blocks(max_model_len, spec):
    """Blocks of 16 tokens; a window of one token spans two."""
    tokens, bits, sink_tokens, reason = chosen(engine(max_model_len), spec)
    profile = load_profile(f"{spec}:plain").resolve(SHAPE).layers[0]
    packed = 128 * (profile.pair.k_bits + profile.pair.v_bits) // 8 + 8
    blocks = -(-tokens // 16) + 1 + bool(sink_tokens) if tokens else 0
    held = blocks * -(-(128 * 2 * bits // 8 + 8 * (bits == 8)) // packed) * 16
    assert held <= largest_share(max_model_len) * max_model_len
    assert "since it would take" in reason
    assert tokens or (spec, max_model_len) == ("K2V2", 1_024), "small ones fit"


def test_an_engine_for_short_texts_can_measure_what_is_served_to_long_ones():
    assert chosen(engine(1_024, additional={"kvtuner_request_tokens": 32_768})) == (64, 16, 4, "")


def test_the_shares():
    assert largest_share(100) == largest_share(SHORT_REQUEST[0]) == pytest.approx(SHORT_REQUEST[1])
    assert largest_share(1 << 20) == largest_share(LONG_REQUEST[0]) == pytest.approx(LONG_REQUEST[1])
    # Longer requests may hold more, not only a smaller share.
    held = [length * largest_share(length) for length in range(1_024, 16_384, 256)]
    assert held == sorted(held)


def test_windows_that_the_engine_refuses_are_passed_over():
    def no_sinks(resolved):
        return ("no sinks here",) if resolved.profile.sink_tokens else ()

    tokens, bits, sink_tokens, reason = chosen(engine(32_768), problems=no_sinks)
    assert (tokens, bits, sink_tokens) == (64, 16, 0)
    assert reason == "a recent window of 64 tokens and the first 4 in 16 bits, since no sinks here"
    assert chosen(engine(32_768), problems=lambda _: ("none",)) == (0, 16, 0, "a recent window, since none")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        pytest.param({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, 32, id="short"),
        pytest.param({"sliding_window": 4096}, 64, id="long"),
        pytest.param({"sliding_window": 32, "layer_types": ["full_attention"] * 2}, 64, id="of no layer"),
        pytest.param({"sliding_window": None}, 64, id="none"),
    ],
)
def test_a_window_is_shorter_than_layers_sliding_windows(text, tokens):
    kinds = text.get("layer_types")
    shape = SHAPE if kinds is None else ModelShape("toy", "Toy", SHAPE.layers[: len(kinds)])
    assert chosen(engine(131_072, **text), shape=shape)[0] == tokens


def test_models_with_states_have_no_window():
    config = engine(131_072)
    config.model_config.is_hybrid = True
    tokens, _, _, reason = chosen(config)
    assert tokens == 0
    assert "linear-attention" in reason


@pytest.mark.parametrize("spec", ["K8V8", "K16V16"])
def test_pairs_of_many_bits_have_none(spec):
    assert chosen(engine(32_768), spec) == (0, 16, 0, "")
