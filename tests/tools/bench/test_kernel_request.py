"""Arguments of ``kvtuner bench kernel``."""

import pytest
import torch

from kvtuner_tools.bench.points import IMPLEMENTATIONS, LayerHeads, QueryTokens
from tests.helpers.kernel_bench import request_of
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PrecisionPair

HEADS = LayerHeads(4, 2, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_defaults():
    request = request_of()

    assert request.shapes == (LayerHeads(32, 8, 128),)
    assert request.pairs == QUANTIZED_PAIRS
    assert [str(point) for point in request.points] == ["64x8192", "8x32000", "1x131072", "mixed:64:256-16128"]
    assert (request.implementations, request.block_sizes, request.transforms) == (IMPLEMENTATIONS, (16,), ("none",))


def test_every_option():
    request = request_of(
        "--shape=7/1/64", "--shape=llama31_8b", "--block-size=16,64", "--points=2x4,mixed:3:8-9", "--pairs=K4V2,k8v8",
        "--store-pairs=K2V2", "--implementations=cuda,fa3_fp8", "--transforms=none,all", "--parts=decode",
        "--query-tokens=4,1+4,4", "--bandwidth=4.37e12",
    )  # fmt: skip

    assert request.shapes == (LayerHeads(7, 1, 64), LayerHeads(32, 8, 128))
    assert request.block_sizes == (16, 64)
    assert request.pairs == (PrecisionPair(4, 2), PrecisionPair(8, 8))
    assert request.implementations == ("cuda", "fa3_fp8")
    assert (request.transforms, request.parts) == (("none", "all"), ("decode",))
    assert request.query_tokens == (QueryTokens((4,)), QueryTokens((1, 4)))
    assert request.head()["query_tokens"] == ["4", "1+4"]
    assert request.bandwidth == 4.37e12


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--implementations=cuda,fa2", "--implementations must be of .*, but got fa2"),
        ("--transforms=some", "--transforms must be of none, hadamard, offset, all, but got some"),
        ("--pairs=K16V16", "pairs must be of .*, but got K16V16"),
        ("--block-size=24", "--block-size must be multiples of 16, but got '24'"),
        ("--query-tokens=17", "query tokens are 1 to 16"),
        ("--query-tokens=1,", "query tokens are 1 to 16"),
        ("--shape=llama33_70b:tp3", "llama33_70b:tp3: num_attention_heads must be a multiple of the 3 ranks"),
        ("--shape=70b", "a shape is HEADS/KV_HEADS/HEAD_SIZE"),
        ("--samples=0", "--samples must be positive, but got 0"),
        ("--jobs=0", "--jobs must be positive, but got 0"),
        ("--bandwidth=-1", "--bandwidth must be positive, but got -1"),
    ],
)
def test_values_that_options_do_not_take(word, message):
    with pytest.raises(ValueError, match=message):
        request_of(word)


def test_queries_longer_than_a_context_are_refused():
    with pytest.raises(ValueError, match="at most the shortest context, which is 7 in 1x7, but got 8"):
        request_of("--points=4x64,1x7", "--query-tokens=1,8")


def test_mixed_query_tokens_need_as_many_requests():
    with pytest.raises(ValueError, match=r"--query-tokens 1\+4 needs points with 2 requests at least, but got 1x64"):
        request_of("--points=4x64,1x64", "--query-tokens=1+4")


def test_a_layer_that_several_names_mean_is_measured_once():
    request = request_of("--shape=llama33_70b", "--shape=qwen3_32b", "--shape=64/8/128", "--shape=gpt_oss_20b:tp8")
    assert request.shapes == (LayerHeads(64, 8, 128), LayerHeads(8, 1, 64, sinks=True))
    assert request.head()["presets"] == {
        "llama33_70b": "64/8/128", "qwen3_32b": "64/8/128", "gpt_oss_20b:tp8": "8/1/64+sinks",
    }  # fmt: skip
