"""The way of a layer with a recent window on a GPU, step by step on a CPU, against what it computes on a CPU.

The reference's kernels are in place of the GPU's, and torch in place of FlashAttention.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import override_forward_context

from tests.helpers.flash_attention import flash_attention
from vllm_kvtuner.attention import impl
from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill import GpuPrefill, WorkspaceShape
from vllm_kvtuner.attention.prefill_plan import PlanRules, plan
from vllm_kvtuner.attention.window_cache import RecentCache, RecentMetadataBuilder
from vllm_kvtuner.attention.window_kernels import GpuWindow
from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.kernels.contract import Span
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.profile import LayerPrecision, RecentWindow, TransformSettings

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_SIZE, QUERY_LEN = 4, 2, 64, 3
BLOCK, RECENT_BLOCK, NULL_BLOCK, OTHERS_BLOCK = 64, 16, 0, 1
SCALE, SOFT_CAP = 0.125, 5.0
NAME = "model.layers.0.attn"
MAX_SEQS, MAX_TOKENS = 8, 400


FLASH = flash_attention(SCALE, SOFT_CAP)
CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(dtype=torch.bfloat16),
    scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS),
    speculative_config=SimpleNamespace(num_speculative_tokens=QUERY_LEN - 1, parallel_drafting=False),
    use_v2_model_runner=True,
)


class Layer:
    """A layer with caches of its own, served as on a CPU or as on a GPU."""

    def __init__(self, on_gpu, window, sliding_window, attend_cached, sinks):
        transforms = TransformSettings(key_hadamard=True, value_hadamard=True)
        shape = LayerShape(num_kv_heads=KV_HEADS, head_size=HEAD_SIZE)
        precision = LayerPrecision(0, PrecisionPair(4, 4), shape, transforms, window)
        self.impl = impl.KVTunerImpl(
            HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, sliding_window, "kvtuner", SOFT_CAP, sinks=sinks,
            settings=impl.LayerSettings(precision, attend_cached),
        )  # fmt: skip
        self.cache = RecentCache(f"{NAME}.recent", window, KV_HEADS, HEAD_SIZE, torch.bfloat16)
        self.impl.take_window(self.cache)
        if on_gpu:
            shape, span = self.impl.shape, Span(sliding_window, window.tokens, window.sink_tokens)
            kernels = ReferenceKernels(shape, span)
            packed = ReferenceKernels(shape._replace(sinks=None), Span(window.tokens))
            newest = GpuWindow(self.cache, kernels, packed)
            workspace = WorkspaceShape(self.impl.prefill_workspace_tokens, torch.bfloat16, CPU)
            self.impl.served = impl.Served(kernels, GpuPrefill(kernels, FLASH, workspace, newest), newest)
        packed = window.pair.is_quantized
        width = content_bytes(window.pair, HEAD_SIZE) if packed else 2 * HEAD_SIZE
        dtype = torch.uint8 if packed else torch.bfloat16
        # New blocks are zeroed by vLLM where pages of several precisions share a pool.
        self.cache.kv_cache = torch.zeros(200, KV_HEADS, RECENT_BLOCK, width, dtype=dtype)
        self.kv_cache = torch.zeros(60, KV_HEADS, BLOCK, content_bytes(precision.pair, HEAD_SIZE), dtype=torch.uint8)
        self.cache.kv_cache[OTHERS_BLOCK].view(torch.uint8).fill_(255)  # NaN
        spec = RecentSpec(
            block_size=RECENT_BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=dtype,
            sliding_window=window.tokens, step_tokens=QUERY_LEN, num_steps=1,
        )  # fmt: skip
        self.builder = RecentMetadataBuilder(spec, [NAME], CONFIG, CPU)

    def step(self, query, key, value, metadata, common, slots):
        window = self.builder.build(0, common())
        context = SimpleNamespace(attn_metadata={NAME: metadata, f"{NAME}.recent": window})
        with override_forward_context(context):
            self.impl.do_kv_cache_update(SimpleNamespace(layer_name=NAME), key, value, self.kv_cache, slots)
            output = torch.full_like(query, torch.nan)
            return self.impl.forward(None, query, key, value, self.kv_cache, metadata, output)


class Request:
    """Lengths and blocks; of the window's blocks, those that it still has."""

    def __init__(self, blocks, recent_blocks):
        self.length = 0
        self.table = [blocks.pop() for _ in range(10)]
        self.recent = [recent_blocks.pop() for _ in range(40)]
        self.head = self.recent[0]

    def recent_row(self, window, stored_from):
        """Blocks before the window belong to others by now, those of tokens that are not stored are the null block; not
        that of the sink tokens."""
        first = max(0, self.length - window.tokens + 1) // RECENT_BLOCK
        row = [OTHERS_BLOCK] * first + self.recent[first:]
        for block in range(-(-self.length // RECENT_BLOCK), stored_from // RECENT_BLOCK):
            row[block] = self.recent[block] = NULL_BLOCK
        if window.sink_tokens:
            row[0] = self.recent[0] = self.head
        return row


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 100])
@pytest.mark.parametrize(
    ("window", "attend_cached", "has_sinks"),
    [
        (RecentWindow(24), False, False),
        (RecentWindow(70), True, True),
        (RecentWindow(24, 8), False, False),
        (RecentWindow(24, 8), False, True),
        (RecentWindow(24, sink_tokens=4), False, False),
        (RecentWindow(24, sink_tokens=16), True, True),
    ],
    ids=str,
)
def test_steps_of_prefills_and_decodes(window, attend_cached, has_sinks, sliding_window, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: CONFIG)
    sinks = 2 * torch.randn(HEADS).bfloat16() if has_sinks else None
    layers = [Layer(on_gpu, window, sliding_window, attend_cached, sinks) for on_gpu in (False, True)]
    blocks, recent_blocks = list(range(1, 60)), list(range(2, 200))
    requests = [Request(blocks, recent_blocks) for _ in range(4)]
    steps = [[1, 1, 1, 90], [2, 3, 1, 80], [1, 1, 30, 100], [3, 2, 90, 9], [1, 20, 40, 7], [1, 1, 1, 3]]
    for step, counts in enumerate(steps):
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        rows, slots, recent_slots = [], [], []
        for request, count in zip(requests, counts, strict=True):
            end = request.length + count
            row = request.recent_row(window, max(0, end - window.tokens - QUERY_LEN + 1))
            rows.append(row)
            for token in range(request.length, end):
                slots.append(request.table[token // BLOCK] * BLOCK + token % BLOCK)
                recent_slots.append(row[token // RECENT_BLOCK] * RECENT_BLOCK + token % RECENT_BLOCK)
            request.length = end
        lens = torch.tensor([request.length for request in requests], dtype=torch.int32)
        decodes = next((i for i, count in enumerate(counts) if count > QUERY_LEN), len(counts))
        planned = None
        if decodes < len(counts):
            rules = PlanRules(MAX_TOKENS + 128, BLOCK, attend_cached, sliding_window, window.tokens, window.sink_tokens)
            planned = plan(rules, starts, lens, decodes, len(counts), CPU)
        total = int(starts[-1])
        metadata = KVTunerMetadata(
            total, decodes, int(starts[decodes]), max(counts[:decodes], default=1), starts, lens,
            torch.tensor([request.table for request in requests], dtype=torch.int32), None, planned,
        )  # fmt: skip

        def common(starts=starts, lens=lens, rows=rows, recent_slots=recent_slots):
            return SimpleNamespace(
                num_reqs=len(lens), max_query_len=int(starts.diff().max()), slot_mapping=torch.tensor(recent_slots),
                seq_lens=lens, query_start_loc=starts, block_table_tensor=torch.tensor(rows, dtype=torch.int32),
            )  # fmt: skip

        query = torch.randn(total, HEADS, HEAD_SIZE).bfloat16()
        key, value = (torch.randn(total, KV_HEADS, HEAD_SIZE).bfloat16() for _ in range(2))
        want, got = (layer.step(query, key, value, metadata, common, torch.tensor(slots)).float() for layer in layers)
        assert not want.isnan().any() and not got.isnan().any()
        # A chunk's first queries read the newest cached tokens from the window. Without attend_cached_prefill the
        # others do so too on a GPU, where those tokens are not masked out one by one.
        exact = slice(0, total if attend_cached else int(starts[decodes]))
        torch.testing.assert_close(got[exact], want[exact], rtol=0, atol=2e-2, msg=f"step {step}")
        assert (got - want).norm() < 0.06 * want.norm()  # measured up to 0.052
        assert not layers[1].cache.kv_cache[NULL_BLOCK].any(), "nothing is stored in the null block"
