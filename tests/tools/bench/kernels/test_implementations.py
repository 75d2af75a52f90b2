"""Names and formats of all implementations."""

import pytest
import torch

from kvtuner_tools.bench.kernels.base import CacheFormat
from kvtuner_tools.bench.kernels.implementations import DECODE
from kvtuner_tools.bench.points import IMPLEMENTATIONS, LayerHeads
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS

HEADS = LayerHeads(4, 2, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_formats_count_every_stored_byte():
    formats = {
        name: {kind.name: kind for kind in kernel.formats(QUANTIZED_PAIRS, 128)} for name, kernel in DECODE.items()
    }

    assert formats["fa3_bf16"] == {"bf16": CacheFormat("bf16", 16.0, 512)}
    assert formats["fa3_fp8"] == {"fp8": CacheFormat("fp8", 8.0, 256)}
    assert (formats["xqa_bf16"], formats["xqa_fp8"]) == (formats["fa3_bf16"], formats["fa3_fp8"])
    assert formats["int4_per_token_head"] == {"int4": CacheFormat("int4", 4.0, 136)}
    assert formats["int4_per_token_head"]["int4"].stored_bits(128) == 4.25
    for name in ("triton", "cuda"):
        assert list(formats[name]) == [pair.name for pair in QUANTIZED_PAIRS]
        assert formats[name]["K8V8"].content_bytes == 264
        assert formats[name]["K4V2"].stored_bits(128) == 3.25


def test_names_are_those_of_the_arguments():
    assert tuple(DECODE) == IMPLEMENTATIONS
