"""Arguments of ``kvtuner bench kernel``."""

import pytest
import torch

from kvtuner_tools.bench.points import IMPLEMENTATIONS, LayerHeads
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
        "--shape=7/1/64", "--shape=llama31_8b", "--block-size=16,64", "--points=1x4,mixed:3:8-9", "--pairs=K4V2,k8v8",
        "--store-pairs=K2V2", "--implementations=cuda,fa3_fp8", "--transforms=none,all", "--parts=decode",
        "--query-tokens=4", "--bandwidth=4.37e12",
    )  # fmt: skip

    assert request.shapes == (LayerHeads(7, 1, 64), LayerHeads(32, 8, 128))
    assert request.block_sizes == (16, 64)
    assert request.pairs == (PrecisionPair(4, 2), PrecisionPair(8, 8))
    assert request.implementations == ("cuda", "fa3_fp8")
    assert (request.transforms, request.parts, request.query_tokens) == (("none", "all"), ("decode",), 4)
    assert request.bandwidth == 4.37e12


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--implementations=cuda,fa2", "--implementations must be of .*, but got fa2"),
        ("--transforms=some", "--transforms must be of none, hadamard, offset, all, but got some"),
        ("--pairs=K16V16", "pairs must be of .*, but got K16V16"),
        ("--block-size=24", "--block-size must be multiples of 16, but got '24'"),
        ("--query-tokens=17", "--query-tokens must be 1 to 16"),
        ("--samples=0", "--samples must be positive, but got 0"),
        ("--jobs=0", "--jobs must be positive, but got 0"),
        ("--bandwidth=-1", "--bandwidth must be positive, but got -1"),
    ],
)
def test_values_that_options_do_not_take(word, message):
    with pytest.raises(ValueError, match=message):
        request_of(word)


def test_queries_longer_than_a_context_are_refused():
    with pytest.raises(ValueError, match="at most the shortest context, but got 8"):
        request_of("--points=4x64,1x7", "--query-tokens=8")
