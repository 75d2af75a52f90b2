"""Ranks that store a part of each request's tokens answer as one that stores all, in threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from vllm.distributed import parallel_state
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

from tests.helpers.context_parallel import slot_mapping
from tests.helpers.flash_attention import flash_attention
from vllm_kvtuner.attention import impl
from vllm_kvtuner.attention.backend import KVTunerMetadataBuilder
from vllm_kvtuner.attention.context_parallel import ContextShards
from vllm_kvtuner.attention.prefill import GpuPrefill, WorkspaceShape
from vllm_kvtuner.attention.sharded_prefill import ShardedPrefill
from vllm_kvtuner.kernels.contract import Segment, Span
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.profile import LayerPrecision, TransformSettings

CPU = torch.device("cpu")
HEADS, HEAD_SIZE, SCALE, SOFT_CAP, BLOCK = 8, 64, 0.125, 5.0, 16
STEPS = (
    ((0, 37), (1, 5)),
    ((1, 1), (0, 60)),  # a decode, and a chunk over what the rank stores of the one before
    ((0, 1), (1, 1)),
    ((1, 1), (0, 1), (2, 1)),
    ((0, 1), (1, 1), (2, 33)),
    ((0, 1), (1, 1), (2, 1)),
)
"""Requests and query tokens of each step, decodes first. The third request has fewer tokens than ranks for a while."""
TOLERANCE = 1e-5
"""Of float32; ranks merge what one sums in another order."""


class Exchange:
    """What the ranks of a group hand each other, step by step."""

    def __init__(self, size):
        self.size, self.barrier, self.parts = size, threading.Barrier(size, timeout=60), [None] * size

    def __call__(self, rank, part):
        self.parts[rank] = part.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


class Group:
    """As vLLM's GroupCoordinator, as far as it is asked."""

    def __init__(self, exchange, rank):
        self.exchange, self.rank_in_group, self.world_size = exchange, rank, exchange.size

    def all_gather(self, part, dim):
        return torch.cat(self.exchange(self.rank_in_group, part), dim)

    def all_reduce(self, part):
        return torch.stack(self.exchange(self.rank_in_group, part)).sum(0)


class Rank:
    """One layer of a rank, and what vLLM's model runner would hand it."""

    def __init__(self, monkeypatch, shards, on_gpu):
        size = 1 if shards is None else shards.size
        config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32),
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=100),
            speculative_config=None,
            use_v2_model_runner=True,
        )
        monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(parallel_state, "get_dcp_world_size_and_rank", lambda *_: (size, 0))
        monkeypatch.setattr(ContextShards, "of", lambda config: shards)
        self.shards, self.heads = shards, HEADS // size
        precision = LayerPrecision(
            0, PrecisionPair(4, 4), LayerShape(1, HEAD_SIZE), TransformSettings(key_hadamard=True, value_hadamard=True)
        )
        self.impl = impl.KVTunerImpl(
            self.heads, HEAD_SIZE, SCALE, 1, None, None, "kvtuner", SOFT_CAP,
            settings=impl.LayerSettings(precision, False),
        )  # fmt: skip
        if on_gpu:
            kernels, flash = ReferenceKernels(self.impl.shape, Span()), flash_attention(SCALE, SOFT_CAP)
            # Room for few tokens, so that a context takes several slices.
            prefill = GpuPrefill(kernels, flash, WorkspaceShape(100, torch.float32, CPU))
            room = torch.empty(2, 100, 1, HEAD_SIZE)  # of a rank's own, which processes share with none
            prefill.workspace = lambda: (room[0], room[1])
            if shards is not None:
                prefill = ShardedPrefill(shards, flash, prefill)
            self.impl.served = impl.Served(kernels, prefill, None)
            self.impl.prefill_workspace_tokens = 32
        self.cache = torch.full((40, 1, BLOCK, content_bytes(precision.pair, HEAD_SIZE)), 255, dtype=torch.uint8)
        config.compilation_config = SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=self.impl)})
        self.builder = KVTunerMetadataBuilder(SimpleNamespace(block_size=BLOCK), ["layer"], config, CPU)
        # A prompt's rest of few tokens is decoded by one rank, which reads its tokens back.
        self.builder._takes_short_prefills = False
        self.tables = torch.randperm(39, generator=torch.Generator().manual_seed(size)).int()[:36].view(3, 12) + 1

    def step(self, requests, lens, query, key, value):
        """Attention of a step's tokens, [num_tokens, heads of the rank, HEAD_SIZE]."""
        shards = self.shards
        size, rank, interleave = (
            (1, 0, 1) if shards is None else (shards.size, shards.group.rank_in_group, shards.interleave)
        )
        starts = torch.tensor([0, *(count for _, count in requests)]).cumsum(0).int()
        tables = self.tables[[request for request, _ in requests]]
        lens = torch.tensor(lens).int()
        positions = torch.cat(
            [torch.arange(end - count, end) for (_, count), end in zip(requests, lens.tolist(), strict=True)]
        )
        slots = torch.empty(len(query), dtype=torch.int64)
        slot_mapping(len(query), len(query), starts, positions, tables, 12, slots, BLOCK, size, rank, interleave)
        self.impl.do_kv_cache_update(SimpleNamespace(layer_name="layer"), key, value, self.cache, slots)
        common = SimpleNamespace(
            max_query_len=max(count for _, count in requests), num_reqs=len(requests), num_actual_tokens=len(query),
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, seq_lens_cpu_upper_bound=lens,
            block_table_tensor=tables, positions=positions, causal=True, mm_req_doc_ranges=None,
            dcp_local_seq_lens=get_dcp_local_seq_lens(lens, size, rank, interleave),
        )  # fmt: skip
        own = query[:, rank * self.heads : (rank + 1) * self.heads]
        output = torch.full_like(own, torch.nan)
        return self.impl.forward(None, own, key, value, self.cache, self.builder.build(0, common), output)


@pytest.mark.quick(1)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize(("size", "interleave"), [(2, 1), (4, 1), (2, 16), (4, 4)])
def test_ranks_answer_as_one(monkeypatch, on_gpu, size, interleave):
    exchange = Exchange(size)
    one = Rank(monkeypatch, None, on_gpu)
    ranks = [Rank(monkeypatch, ContextShards(Group(exchange, rank), interleave, None), on_gpu) for rank in range(size)]
    random, lens = torch.Generator().manual_seed(0), [0, 0, 0]
    for requests in STEPS:
        for request, count in requests:
            lens[request] += count
        tokens = sum(count for _, count in requests)
        query, key, value = (torch.randn(tokens, heads, HEAD_SIZE, generator=random) for heads in (HEADS, 1, 1))
        arguments = requests, [lens[request] for request, _ in requests], query, key, value
        expected = one.step(*arguments)
        with ThreadPoolExecutor(size) as pool:
            parts = [each.result() for each in [pool.submit(rank.step, *arguments) for rank in ranks]]
        assert (torch.cat(parts, 1) - expected).abs().max() <= TOLERANCE


def test_what_sees_nothing_on_any_rank_is_nothing():
    """As of a CUDA graph's padding, whatever a kernel has left there."""
    exchange = Exchange(2)

    def combine(rank):
        part = Segment(torch.full((1, 4, HEAD_SIZE), 3.0), torch.tensor([[torch.inf], [-torch.inf]] * 2))
        return ContextShards(Group(exchange, rank), 1, None).combine(part)

    with ThreadPoolExecutor(2) as pool:
        for combined in pool.map(combine, range(2)):
            assert combined.output.count_nonzero() == 0
            assert combined.lse.isneginf().all()


def test_attention_sinks_are_refused(monkeypatch):
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(parallel_state, "get_dcp_world_size_and_rank", lambda *_: (2, 0))
    precision = LayerPrecision(3, PrecisionPair(4, 4), LayerShape(1, HEAD_SIZE), TransformSettings())
    with pytest.raises(ValueError, match=r"^layer 3: decode_context_parallel_size must be 1 beside attention sinks"):
        impl.KVTunerImpl(
            HEADS, HEAD_SIZE, SCALE, 1, sinks=torch.zeros(HEADS), settings=impl.LayerSettings(precision, False)
        )
