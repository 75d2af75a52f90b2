"""The way of a layer with a recent window on a GPU, step by step on a CPU, against what it computes on a CPU.

The reference is in place of this package's kernels, and torch in place of vLLM's.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from vllm_kvtuner.attention import backend, impl, prefill_plan, window_cache, window_kernels
from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.kernels import layer
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref, reshape_and_cache_ref, store_rows_ref
from vllm_kvtuner.kernels.reference.window_attention import recent_attention_ref
from vllm_kvtuner.kernels.triton import window_attention
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.profile import LayerPrecision, RecentWindow, TransformSettings

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_SIZE, QUERY_LEN = 4, 2, 64, 3
BLOCK, RECENT_BLOCK, NULL_BLOCK, OTHERS_BLOCK = 64, 16, 0, 1
SCALE, SOFT_CAP = 0.125, 5.0
NAME = "model.layers.0.attn"
MAX_SEQS, MAX_TOKENS = 8, 400


def flash(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, softcap, causal, window_size,
    return_softmax_lse, fa_version,
):  # fmt: skip
    """As vLLM's flash_attn_varlen_func by its docstring. A row that sees nothing has the log-sum-exp +inf, as
    FlashAttention 2 gives it, and values that are NaN stay NaN under a probability of 0."""
    assert return_softmax_lse and fa_version == 3
    output, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf)
    bounds = cu_seqlens_q.tolist()
    for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
        span = slice(*cu_seqlens_k[request : request + 2].tolist())
        keys, values = k[span], v[span]
        assert end - begin <= max_seqlen_q and len(keys) <= max_seqlen_k
        position = torch.arange(end - begin)[:, None] + len(keys) - (end - begin)
        seen = torch.ones(end - begin, len(keys), dtype=torch.bool)
        if causal:
            seen &= torch.arange(len(keys)) <= position
        if window_size[0] >= 0:
            seen &= torch.arange(len(keys)) >= position - window_size[0]
        group = q.shape[1] // k.shape[-2]
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys.float().repeat_interleave(group, 1))
        scores = softcap * torch.tanh(scores * softmax_scale / softcap)
        scores = torch.where(seen, scores, -torch.inf)
        sums = scores.logsumexp(-1)
        weights = torch.where(sums.isneginf()[..., None], 0.0, (scores - sums[..., None]).exp())
        output[begin:end] = torch.einsum("hqk,khd->qhd", weights, values.float().repeat_interleave(group, 1)).to(
            q.dtype
        )
        lse[:, begin:end] = torch.where(sums.isneginf(), torch.inf, sums)
    return output, lse


def reshape_and_cache(key, value, kv_cache, slot_mapping, positions, layout, transforms, rows):
    """As this package's, which keep new tokens in a recent window too."""
    reshape_and_cache_ref(key, value, kv_cache, slot_mapping, positions, layout, transforms)
    if rows is not None:
        rows.check(key, len(slot_mapping))
        store_rows_ref(key, value, rows.kv_cache, rows.slot_mapping)


@pytest.fixture
def replaced(monkeypatch):
    """vLLM's and this package's GPU kernels."""
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 3)
    # Under the interpreter the kernel would multiply bf16's bit patterns.
    monkeypatch.setattr(
        window_attention,
        "recent_attention",
        lambda *arguments, dependent, pass_query_len: recent_attention_ref(*arguments),
    )
    decode = SimpleNamespace(
        paged_attention=lambda *arguments, workspace, pass_query_len: paged_attention_ref(*arguments)
    )
    rows = layer._RowKernels(reshape_and_cache, gather_cache_ref)
    monkeypatch.setattr(layer, "_decode_module", lambda kernel: (decode, {}))
    monkeypatch.setattr(layer, "_row_kernels", lambda kernels: rows)
    monkeypatch.setattr(layer, "_triton_workspace", lambda *arguments: None)
    monkeypatch.setattr(window_cache, "max_decode_query_len", lambda config: QUERY_LEN)
    monkeypatch.setattr(impl, "max_decode_query_len", lambda config: QUERY_LEN)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS),
    )
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
    return config


class Layer:
    """A layer with caches of its own, on a CPU or as on a GPU."""

    def __init__(self, monkeypatch, config, on_gpu, window, sliding_window, attend_cached):
        transforms = TransformSettings(key_hadamard=True, value_hadamard=True)
        shape = LayerShape(num_kv_heads=KV_HEADS, head_size=HEAD_SIZE)
        precision = LayerPrecision(0, PrecisionPair(4, 4), shape, transforms, window)
        monkeypatch.setattr(impl, "current_platform", SimpleNamespace(
            is_cpu=lambda: not on_gpu, device_type="cpu", current_device=lambda: 0,
        ))  # fmt: skip
        self.impl = impl.KVTunerImpl(
            HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, sliding_window, "kvtuner", SOFT_CAP,
            settings=impl.LayerSettings(precision, attend_cached),
        )  # fmt: skip
        self.cache = window_cache.RecentCache(f"{NAME}.recent", window, KV_HEADS, HEAD_SIZE, torch.bfloat16)
        self.impl.take_window(self.cache)
        assert (self.impl.recent_kernels is not None) == on_gpu
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
        self.builder = window_cache.RecentMetadataBuilder(spec, [NAME], config, CPU)

    def step(self, monkeypatch, query, key, value, metadata, common, slots):
        window = self.builder.build(0, common())
        context = SimpleNamespace(attn_metadata={NAME: metadata, f"{NAME}.recent": window})
        for module in (impl, window_cache, window_kernels):
            monkeypatch.setattr(module, "get_forward_context", lambda: context)
        layer = SimpleNamespace(layer_name=NAME)
        self.impl.do_kv_cache_update(layer, key, value, self.kv_cache, slots)
        output = torch.full_like(query, torch.nan)
        return self.impl.forward(layer, query, key, value, self.kv_cache, metadata, output)


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


@pytest.mark.parametrize("sliding_window", [None, 100])
@pytest.mark.parametrize(
    ("window", "attend_cached"),
    [
        (RecentWindow(24), False),
        (RecentWindow(70), True),
        (RecentWindow(24, 8), False),
        (RecentWindow(24, sink_tokens=4), False),
        (RecentWindow(24, sink_tokens=16), True),
    ],
    ids=str,
)
def test_steps_of_prefills_and_decodes(window, attend_cached, sliding_window, replaced, monkeypatch):
    torch.manual_seed(0)
    layers = [Layer(monkeypatch, replaced, on_gpu, window, sliding_window, attend_cached) for on_gpu in (False, True)]
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
        plan = None
        if decodes < len(counts):
            plan = prefill_plan.plan(
                query_start_loc=starts, seq_lens=lens, first_request=decodes, num_reqs=len(counts),
                workspace_tokens=MAX_TOKENS + 128, block_size=BLOCK, attend_cached=attend_cached,
                sliding_window=sliding_window, recent=window.tokens, device=CPU,
                sink_tokens=window.sink_tokens,
            )  # fmt: skip
        total = int(starts[-1])
        metadata = backend.KVTunerMetadata(
            total, decodes, int(starts[decodes]), max(counts[:decodes], default=1), starts, lens,
            torch.tensor([request.table for request in requests], dtype=torch.int32), None, plan,
        )  # fmt: skip

        def common(starts=starts, lens=lens, rows=rows, recent_slots=recent_slots):
            return SimpleNamespace(
                num_reqs=len(lens), max_query_len=int(starts.diff().max()), slot_mapping=torch.tensor(recent_slots),
                seq_lens=lens, query_start_loc=starts, block_table_tensor=torch.tensor(rows, dtype=torch.int32),
            )  # fmt: skip

        query = torch.randn(total, HEADS, HEAD_SIZE).bfloat16()
        key, value = (torch.randn(total, KV_HEADS, HEAD_SIZE).bfloat16() for _ in range(2))
        want, got = (
            layer.step(monkeypatch, query, key, value, metadata, common, torch.tensor(slots)).float()
            for layer in layers
        )
        assert not want.isnan().any() and not got.isnan().any()
        # A chunk's first queries read the newest cached tokens from the window. Without attend_cached_prefill the
        # others do so too on a GPU, where those tokens are not masked out one by one.
        exact = slice(0, total if attend_cached else int(starts[decodes]))
        torch.testing.assert_close(got[exact], want[exact], rtol=0, atol=2e-2, msg=f"step {step}")
        assert (got - want).norm() < 0.05 * want.norm()
        assert not layers[1].cache.kv_cache[NULL_BLOCK].any(), "nothing is stored in the null block"
