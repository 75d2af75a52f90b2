"""A layer with attention sinks, prefills over cached prefixes and decodes, against one plain softmax.

In fp32 and K8V8, whose rounding is far below what a sink that is left out or counted twice would do.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.flash_attention import flash_attention
from vllm_kvtuner.attention import impl
from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill import GpuPrefill, WorkspaceShape
from vllm_kvtuner.attention.prefill_plan import PlanRules, plan
from vllm_kvtuner.attention.segments import count_sinks
from vllm_kvtuner.kernels.contract import Segment
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.profile import LayerPrecision, TransformSettings

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 4, 2, 64, 16
SCALE = HEAD_SIZE**-0.5
MAX_SEQS, MAX_TOKENS = 4, 200
STEPS = [[1, 40, 50], [1, 1, 90], [1, 30, 60], [1, 1, 1]]
"""New tokens of each request in each step; decodes first."""
CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(dtype=torch.float32),
    scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS),
    speculative_config=None,
    use_v2_model_runner=True,
)
TOLERANCE = 3e-2
"""Of outputs of values of unit variance; measured 0.015. Without sinks they are up to 3.0 off."""


def layer_of(on_gpu, sinks, sliding_window, attend_cached, workspace, monkeypatch):
    """An implementation served as on a CPU, or as on a GPU with the reference's kernels and FlashAttention in torch."""
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: CONFIG)
    shape = LayerShape(num_kv_heads=KV_HEADS, head_size=HEAD_SIZE)
    precision = LayerPrecision(0, PrecisionPair(8, 8), shape, TransformSettings(value_hadamard=True), None)
    layer = impl.KVTunerImpl(
        HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, sliding_window, "kvtuner", sinks=sinks,
        settings=impl.LayerSettings(precision, attend_cached),
    )  # fmt: skip
    if on_gpu:
        room = WorkspaceShape(workspace, torch.float32, CPU)
        prefill = GpuPrefill(layer.served.kernels, flash_attention(SCALE), room)
        layer.served = layer.served._replace(prefill=prefill)
    return layer


def plain(query, key, value, sinks, sliding_window):
    """One softmax over all tokens that each of a request's newest sees, and its sink."""
    logits = torch.einsum("qhd,thd->hqt", query, key.repeat_interleave(HEADS // KV_HEADS, 1)) * SCALE
    distance = len(key) - len(query) + torch.arange(len(query))[:, None] - torch.arange(len(key))
    seen = (distance >= 0) & (distance < (sliding_window or len(key)))
    columns = [logits.masked_fill(~seen, -torch.inf), sinks.float()[:, None, None].expand(-1, len(query), 1)]
    weights = torch.cat(columns, -1).softmax(-1)[..., :-1]
    return torch.einsum("hqt,thd->qhd", weights, value.repeat_interleave(HEADS // KV_HEADS, 1))


@pytest.mark.quick(1)
@pytest.mark.parametrize("sliding_window", [None, 24])
@pytest.mark.parametrize("attend_cached", [False, True])
@pytest.mark.parametrize(
    ("on_gpu", "workspace"), [(False, 0), (True, 300), (True, 128)], ids=["cpu", "gpu, at once", "gpu, in slices"]
)
def test_prefills_and_decodes(on_gpu, workspace, attend_cached, sliding_window, monkeypatch):
    """Fresh tokens alone, and merged with a cached prefix that is read at once or in slices."""
    torch.manual_seed(0)
    # vLLM's parameter, whose numbers are loaded after the layer has been made.
    sinks = torch.nn.Parameter(torch.full((HEADS,), -torch.inf, dtype=torch.bfloat16), requires_grad=False)
    layer = layer_of(on_gpu, sinks, sliding_window, attend_cached, workspace, monkeypatch)
    sinks.data.copy_(torch.tensor([4.0, -torch.inf, 2.0, 6.0]))
    kv_cache = torch.zeros(64, KV_HEADS, BLOCK, content_bytes(PrecisionPair(8, 8), HEAD_SIZE), dtype=torch.uint8)
    tables = 1 + torch.randperm(60).int().view(3, 20)
    past = [[torch.empty(0, KV_HEADS, HEAD_SIZE)] * 2 for _ in range(3)]
    rules = PlanRules(workspace or 300, BLOCK, attend_cached, sliding_window)
    for counts in STEPS:
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        query = torch.randn(int(starts[-1]), HEADS, HEAD_SIZE)
        key, value = (torch.randn(len(query), KV_HEADS, HEAD_SIZE) for _ in range(2))
        slots, want = [], []
        for request, count in enumerate(counts):
            rows = slice(int(starts[request]), int(starts[request + 1]))
            before = len(past[request][0])
            past[request] = [torch.cat([old, new[rows]]) for old, new in zip(past[request], (key, value), strict=True)]
            token = torch.arange(before, before + count)
            slots.append(tables[request].long()[token // BLOCK] * BLOCK + token % BLOCK)
            want.append(plain(query[rows], *past[request], sinks, sliding_window))
        lens = torch.tensor([len(keys) for keys, _ in past], dtype=torch.int32)
        decodes = next((index for index, count in enumerate(counts) if count > 1), len(counts))
        planned = plan(rules, starts, lens, decodes, len(counts), CPU) if decodes < len(counts) else None
        metadata = KVTunerMetadata(
            len(query), decodes, int(starts[decodes]), 1, starts, lens, tables, None, planned
        )  # fmt: skip
        layer.do_kv_cache_update(None, key, value, kv_cache, torch.cat(slots))
        got = layer.forward(None, query, key, value, kv_cache, metadata, torch.full_like(query, torch.nan))
        torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=TOLERANCE)


def test_rows_that_see_nothing_stay_0():
    """FlashAttention 2 gives them the log-sum-exp +inf, the merge -inf; heads that pad a rank's have the sink -inf."""
    segment = Segment(torch.zeros(2, 2, 8), torch.tensor([[torch.inf, -torch.inf]] * 2))
    output = torch.full((2, 2, 8), torch.nan)
    count_sinks(segment, torch.tensor([1.0, -torch.inf]), output)
    assert not output.any()
