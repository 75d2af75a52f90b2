"""XQA: what it is told of a batch, and why it is left out; no kernel of FlashInfer runs."""

import importlib.util
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvtuner_tools.bench.kernel_measure import ErrorCase, ErrorInputs
from kvtuner_tools.bench.kernels import flashinfer
from kvtuner_tools.bench.kernels.implementations import DECODE
from kvtuner_tools.bench.points import LayerHeads, QueryTokens
from tests.helpers.kernel_bench import HEADS

BF16_ROUNDING = 2**-8


def xqa_in_torch(
    *, query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale, bmm2_scale, window_left, out,
    kv_layout, q_len_per_req, mask, q_cu_seq_lens,
):  # fmt: skip
    """The call as FlashInfer documents it, read literally: requests' rows, pages by strides, the mask bit by bit."""
    assert (kv_layout, bmm2_scale, window_left) == ("NHD", 1.0, -1)
    assert not workspace_buffer.any() and workspace_buffer.dtype == torch.uint8
    assert max_seq_len >= int(seq_lens.max())
    if q_cu_seq_lens is None:
        starts = [request * q_len_per_req for request in range(len(seq_lens) + 1)]
        assert mask is None or mask.shape == (len(seq_lens), q_len_per_req, 2)
    else:
        assert q_len_per_req > 1 and mask.shape == (len(query), 2)
        starts = q_cu_seq_lens.tolist()
    assert (mask is None) == (q_len_per_req == 1) and starts[-1] == len(query)
    masks = None if mask is None else mask.view(-1, 2).view(torch.uint16).long()
    for request, length in enumerate(seq_lens.tolist()):
        begin, end = starts[request : request + 2]
        pages = block_tables[request].long()
        keys, values = (side[pages].flatten(0, 1)[:length].double() for side in kv_cache)
        for row in range(begin, end):
            committed = length - (end - begin)
            seen = torch.ones(length, dtype=torch.bool)
            if masks is not None:
                bits = int(masks[row, 0]) | int(masks[row, 1]) << 16
                seen[committed:] = torch.tensor([bool(bits >> index & 1) for index in range(end - begin)])
                assert bits >> (end - begin) == 0
            group = query.shape[1] // keys.shape[1]
            keys_of, values_of = (side.repeat_interleave(group, 1) for side in (keys, values))
            scores = torch.einsum("hd,lhd->hl", query[row].double(), keys_of) * bmm1_scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[row] = torch.einsum("hl,lhd->hd", weights, values_of).to(out.dtype)


@pytest.fixture
def fake(monkeypatch):
    """FlashInfer in torch, and no stores of vLLM."""
    package, decode = ModuleType("flashinfer"), ModuleType("flashinfer.decode")
    decode.xqa_batch_decode_with_kv_cache = xqa_in_torch
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decode)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr(flashinfer, "flash_stores", lambda *_: ())


@pytest.mark.parametrize("query_tokens", ["1", "3", "1+3"])
@pytest.mark.parametrize("name", ["xqa_bf16", "xqa_fp8"])
def test_it_is_told_the_batch_as_float64_sees_it(name, query_tokens, fake):
    """A wrong mask, table, cache or scale would show as an error far above bf16's rounding."""
    torch.manual_seed(0)
    (cache_format,) = DECODE[name].formats((), 64)
    case = ErrorCase(name, HEADS, 16, cache_format, "none", QueryTokens.parse(query_tokens), torch.device("cpu"))
    error = case.error(ErrorInputs((40, 1, 17)))
    assert 0 < error.largest <= BF16_ROUNDING
    assert error.largest == error.rounding, "nothing but the output's rounding"


def test_a_mask_shows_each_token_itself_and_those_before():
    assert flashinfer.draft_mask((3, 1), torch.device("cpu")).long().tolist() == [[1, 0], [3, 0], [7, 0], [1, 0]]
    last = flashinfer.draft_mask((16,), torch.device("cpu"))[-1]
    assert (last.dtype, last.long().tolist()) == (torch.uint16, [0xFFFF, 0])
    assert flashinfer.draft_mask((18,), torch.device("cpu"))[-1].long().tolist() == [0xFFFF, 3]


@pytest.mark.parametrize(
    ("shape", "block_size", "reason"),
    [
        ("64/8/128", 16, None),
        ("96/8/128", 64, None),
        ("64/2/256", 128, None),
        ("16/2/72", 16, "head sizes are multiples of 16 up to 256, not 72"),
        ("16/2/512", 16, "head sizes are multiples of 16 up to 256, not 512"),
        ("64/8/128", 256, "block sizes are 16, 32, 64, 128, not 256"),
        ("66/2/256", 16, "XQA serves at most 32 query heads per KV head at head size 256, not 33"),
        ("130/2/128", 16, "XQA serves at most 64 query heads per KV head at head size 128, not 65"),
        ("128/1/64", 16, None),
    ],
)
def test_shapes_without_a_kernel(shape, block_size, reason):
    found = flashinfer.unserved_shape(LayerHeads.parse(shape), block_size)
    assert found == reason if reason is None else reason in found


def test_what_is_missing_is_said_before_anything_runs(monkeypatch):
    found = {"flashinfer": None, "flashinfer_jit_cache": None}
    paths = {"nvcc": None, "ninja": None}
    capability = SimpleNamespace(now=(8, 0))
    monkeypatch.setattr(flashinfer, "vllm_skip_reason", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", found.__getitem__)
    monkeypatch.setattr(shutil, "which", paths.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability.now)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def reason() -> str | None:
        return DECODE["xqa_fp8"].skip_reason(LayerHeads(64, 8, 128), 16)

    assert reason() == "XQA needs compute capability 9, 10 or 12, and the card has 8.0"
    capability.now = (9, 0)
    assert reason() == "FlashInfer is not installed"
    found["flashinfer"] = object()
    assert reason() == "FlashInfer compiles XQA at its first use, but nvcc is missing"
    paths["/usr/local/cuda/bin/nvcc"] = "/usr/local/cuda/bin/nvcc"
    assert reason() == "FlashInfer compiles XQA at its first use, but ninja is missing"
    paths["ninja"] = "/usr/bin/ninja"
    assert reason() is None
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert reason() == "FlashInfer compiles XQA at its first use, but nvcc is missing", "FlashInfer looks there alone"
    found["flashinfer_jit_cache"] = object()
    assert reason() is None, "compiled kernels are installed"
    monkeypatch.setattr(flashinfer, "vllm_skip_reason", lambda: "vLLM is not installed")
    assert reason() == "vLLM is not installed"
