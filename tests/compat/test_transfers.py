"""What NIXL's workers move of packed pages, and whom they refuse; two engines do it in tests/serving/cpu/test_nixl.py.

vLLM's own workers, with a stand-in for NIXL between them that refuses memory which was not registered.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.helpers.nixl_workers import NUM_BLOCKS, NUM_HEADS, make_rank, read
from vllm_kvtuner import compat
from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.compat import transfers
from vllm_kvtuner.engine import config as engine_config
from vllm_kvtuner.engine import page_facts
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.profile import Profile

K8V8, K8V4, K4V8, K4V2, K2V2 = (PrecisionPair(*bits) for bits in ((8, 8), (8, 4), (4, 8), (4, 2), (2, 2)))
CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1."
MIXED = (K8V8, K4V2, K8V4, K2V2)
"""Pages of four sizes."""
PAGES = [([4, 1, 3], [2, 5, 0])]
"""Blocks here and there."""


@pytest.fixture(autouse=True)
def patched():
    compat.apply()
    KVConnectorFactory.get_connector_class(SimpleNamespace(kv_connector="NixlConnector", kv_connector_module_path=None))


@pytest.fixture
def rank_of(monkeypatch):
    """Makes ranks of engines."""

    def make(groups, *, tp_rank=0, tp_size=1, block_size=32, statics="s", dtype="kvtuner"):
        pairs = [pair for group in groups for pair in group if isinstance(pair, PrecisionPair)]
        shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(NUM_HEADS, 64),) * len(pairs))
        resolved = Profile("p", None, dict(enumerate(pairs))).resolve(shape)
        monkeypatch.setattr(transfers, "resolved_profile", lambda config: config.resolved)
        monkeypatch.setattr(page_facts, "resolved_profile", lambda config: config.resolved)
        config = vllm_config(tp_size, block_size, layout="LBHNC" if len(groups) == 1 else "BLHNC")
        config.cache_config.cache_dtype = dtype
        config.resolved = resolved
        config.additional_config = {engine_config.DIGEST_KEY: f"{resolved.layers!r}{statics}"}
        config.model_config.hf_text_config.layer_types = ["full", "sliding"] if len(groups) > 1 else ["full"]
        config.model_config.is_hybrid = len(pairs) < sum(map(len, groups))
        return make_rank(monkeypatch, config, groups, tp_rank=tp_rank, tp_size=tp_size, block_size=block_size)

    return make


def vllm_config(tp_size, block_size, layout):
    """As far as a worker reads it."""
    cache = SimpleNamespace(
        block_size=block_size,
        cache_dtype="kvtuner",
        enable_prefix_caching=True,
        get_resolved_kv_cache_layout=lambda: SimpleNamespace(name=layout),
    )
    model = SimpleNamespace(
        model="toy",
        dtype="bfloat16",
        use_mla=False,
        is_hybrid=False,
        enable_sleep_mode=False,
        hf_text_config=SimpleNamespace(),
        get_total_num_kv_heads=lambda: NUM_HEADS,
        get_head_size=lambda: 64,
        get_total_num_hidden_layers=lambda: 4,
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
    )
    transfer = SimpleNamespace(
        kv_buffer_device="cpu", kv_role="kv_both", enable_permute_local_kv=False, get_from_extra_config=lambda _, it: it
    )
    return SimpleNamespace(
        cache_config=cache,
        model_config=model,
        parallel_config=parallel,
        kv_transfer_config=transfer,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def heads_of(ranks, layer, blocks):
    """[blocks, KV heads of the model, tokens, content]."""
    return torch.cat([list(rank.caches.values())[layer][blocks] for rank in ranks], dim=1)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 2)])
def test_ranks_take_their_heads_whatever_the_other_end_has(prefill, decode, rank_of):
    """A page's heads lie one after the other, so any share of them is a piece of it."""
    owners = [rank_of([MIXED], tp_rank=rank, tp_size=prefill) for rank in range(prefill)]
    readers = [rank_of([MIXED], tp_rank=rank, tp_size=decode) for rank in range(decode)]
    (here, there), untouched = PAGES[0], [0, 2, 5]
    before = [heads_of(readers, layer, untouched) for layer in range(len(MIXED))]
    for reader in readers:
        read(reader, owners, PAGES)
    for layer in range(len(MIXED)):
        assert torch.equal(heads_of(readers, layer, here), heads_of(owners, layer, there))
        assert torch.equal(heads_of(readers, layer, untouched), before[layer])


@pytest.mark.parametrize("groups", [[(K2V2, K8V8), (K8V8, K2V2)], [(K8V4,), (K2V2, K4V2), (K4V8, K2V2)]])
def test_whole_pages_come_where_layers_of_unlike_groups_begin_at_one_place(groups, rank_of):
    owner, reader = rank_of(groups), rank_of(groups)
    pages = [([number], [number + 2]) for number in range(len(groups))]
    read(reader, [owner], pages)
    layers = iter(range(100))
    for group, (here, there) in zip(groups, pages, strict=True):
        for layer in [next(layers) for _ in group]:
            assert torch.equal(heads_of([reader], layer, here), heads_of([owner], layer, there))


@pytest.mark.parametrize(
    ("groups", "other", "named"),
    [
        ([MIXED], {"groups": [(K8V8, K4V2, K4V8, K2V2)]}, ["pairs", "profile and statics"]),
        ([MIXED], {"statics": "another"}, ["profile and statics"]),
        ([MIXED], {"block_size": 64}, ["block_size"]),
        ([(K2V2, K8V8), (K8V8,)], {"tp_size": 2}, ["tensor_parallel_size"]),
    ],
)
def test_an_end_with_other_pages_is_refused_by_what_differs(groups, other, named, rank_of):
    """Each would be read: pages of equal size, blocks that are taken apart, and heads of the wrong pages."""
    reader, owner = rank_of(groups), rank_of(**{"groups": groups, **other})
    with pytest.raises(RuntimeError, match="NIXL handshake refused: the two engines' pages differ: ") as refusal:
        read(reader, [owner], [([0], [0])] * len(groups))
    found = str(refusal.value).partition("differ: ")[2].split("; ")
    assert [each.partition(" is ")[0] for each in found if " is " in each] == named


def test_states_come_where_blocks_hold_more_than_one(rank_of, monkeypatch):
    """Two states of a gated delta net to a block, as far apart as blocks are, beside pages of unlike pairs."""
    for module in ("vllm.model_executor.layers.mamba.mamba_utils", CONNECTORS + "ssm_conv_transfer_utils"):
        monkeypatch.setattr(importlib.import_module(module), "is_conv_state_dim_first", lambda: True)
    state = MambaSpec(
        block_size=32,
        shapes=((96, 3), (2, 16, 32)),
        dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=6144,
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
    )
    content = 96 * 3 * 2 + 2 * 16 * 32 * 4
    groups = [(K8V4, K4V2), (state, state)]
    owner, reader = rank_of(groups), rank_of(groups)
    assert len(set(reader.worker.block_stride_per_layer)) == 1
    pages = [([0, 3], [4, 1]), ([5], [2])]
    pool = next(iter(reader.caches.values())).untyped_storage()
    before = torch.tensor(pool, dtype=torch.uint8)
    read(reader, [owner], pages)
    for layer in range(4):
        (here, there), end = pages[layer // 2], (None, content)[layer // 2]
        assert torch.equal(heads_of([reader], layer, here)[..., :end], heads_of([owner], layer, there)[..., :end])
    # Nothing else of the pool has changed.
    block = len(before) // NUM_BLOCKS
    now = torch.tensor(pool, dtype=torch.uint8).view(NUM_BLOCKS, block)
    for untouched in (1, 2, 4):
        assert torch.equal(now[untouched], before.view(NUM_BLOCKS, block)[untouched])


def scheduler_of(*specs, dtype="kvtuner"):
    """A decoding engine's scheduler, of cache groups with these specs."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    config = vllm_config(1, 32, "BLHNC")
    config.cache_config.cache_dtype = dtype
    config.num_prefill_lookahead_tokens = 0
    config.parallel_config.data_parallel_index = 0
    groups = [KVCacheGroupSpec([f"layer {number}"], spec) for number, spec in enumerate(specs)]
    cache = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    return NixlPullConnectorScheduler(config, "an engine", cache)


SHAPE = dict(num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
FULL = FullAttentionSpec(block_size=32, **SHAPE)
SLIDING = SlidingWindowSpec(block_size=32, sliding_window=64, **SHAPE)
RECENT = RecentSpec(block_size=16, sliding_window=32, step_tokens=1, num_steps=1, sink_tokens=4, **SHAPE)


@pytest.mark.parametrize(
    ("specs", "dtype", "tokens"),
    [
        ((FULL,), "kvtuner", 0),
        ((FULL, SLIDING), "kvtuner", 1),
        ((FULL, UniformTypeKVCacheSpecs(32, {"layer 1": SLIDING})), "kvtuner", 1),
        ((FULL, RECENT), "kvtuner", 1),
        ((FULL, SLIDING), "auto", 0),
    ],
)
def test_windows_are_moved_as_the_prompts_last_token_sees_them(specs, dtype, tokens):
    """The decoding engine computes that token again."""
    assert scheduler_of(*specs, dtype=dtype)._prefill_backoff() == tokens


@pytest.mark.parametrize(
    ("owned", "here", "moved"),
    [
        # The window of what is read begins at block 4; the owner keeps one more, and has freed those between.
        ([1, 0, 0, 0, 15, 16, 17], [8, None, None, None, None, 6, 7], [(1, 8), (16, 6), (17, 7)]),
        # Sink tokens, and a part of the window, in the reader's prefix cache.
        ([1, 0, 0, 0, 15, 16, 17], ["8", None, None, None, "5", 6, 7], [(16, 6), (17, 7)]),
        # Few blocks: those of the sink tokens are among the last ones.
        ([1, 12, 13], [8, 6, 7], [(1, 8), (12, 6), (13, 7)]),
        ([1, 12, 13, 14], [8, None, 6, 7], [(1, 8), (13, 6), (14, 7)]),
    ],
)
def test_sink_tokens_come_with_the_newest_of_a_window(owned, here, moved):
    """Blocks of a request there, 0 where freed; and here, None where not needed, quoted where in the prefix cache."""
    scheduler = scheduler_of(FULL, RECENT)
    remote = scheduler.get_exchange_clipped_blocks(([1, 2, 3], owned))
    assert remote[0] == [1, 2, 3]
    blocks = [
        SimpleNamespace(
            block_id=int(each or 0), is_null=each is None, block_hash="a hash" if isinstance(each, str) else None
        )
        for each in here
    ]
    table = KVCacheBlocks(
        ([SimpleNamespace(block_id=number, is_null=False, block_hash=None) for number in (4, 5, 9)], blocks)
    )
    names = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")
    params = {"do_remote_prefill": True, "remote_block_ids": remote, **dict.fromkeys(names, "x")}
    request = SimpleNamespace(request_id="r", kv_transfer_params=params)
    scheduler.update_state_after_alloc(request, table, 90)
    _, local, *_ = scheduler._reqs_need_recv["r"]
    assert list(zip(params["remote_block_ids"][1], local[1], strict=True)) == moved
    assert list(zip(params["remote_block_ids"][0], local[0], strict=True)) == [(1, 4), (2, 5), (3, 9)]


def test_an_end_without_packed_pages_is_refused(rank_of):
    reader, owner = rank_of([MIXED]), rank_of([MIXED], dtype="auto")
    with pytest.raises(RuntimeError, match="the other engine's KV cache is not kvtuner's"):
        read(reader, [owner], PAGES)


def test_unequal_pages_are_asked_to_lie_in_blocks():
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector

    config = vllm_config(1, 32, "LBHNC")
    config.resolved = SimpleNamespace(recent_windows=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers, "resolved_profile", lambda config: config.resolved)
        assert NixlConnector.get_required_kvcache_layout(config) == "LBHNC"
        config.resolved.recent_windows = ("a window",)
        assert NixlConnector.get_required_kvcache_layout(config) == "BLHNC"
        config.cache_config.cache_dtype = "auto"
        assert NixlConnector.get_required_kvcache_layout(config) == "LBHNC"


def test_transfers_that_would_be_wrong_are_refused():
    """Ends that do not compare, and parts of requests; alone, and among connectors."""

    def got(extra, ranks=1):
        told = {"kv_connector": "NixlConnector", "kv_connector_extra_config": extra}
        nested = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [told]}}
        config = SimpleNamespace(
            model_config=SimpleNamespace(is_hybrid=False, model="toy"),
            parallel_config=SimpleNamespace(decode_context_parallel_size=ranks),
        )
        found = []
        for each in (told, nested):
            config.kv_transfer_config = KVTransferConfig(kv_role="kv_both", **each)
            found.append(page_facts.refused_transfers(config))
        assert found[0] == found[1]
        return [problem.rpartition(", but got ")[2] for problem in found[0]]

    assert got({}) == []
    assert got({"enforce_handshake_compat": False}) == ["false for NixlConnector"]
    assert got({}, ranks=2) == ["2 with NixlConnector"]
    assert not page_facts.refused_transfers(SimpleNamespace(kv_transfer_config=None))


@pytest.mark.parametrize(
    ("kinds", "layout", "is_cpu", "refused"),
    [
        ([((96, 3), (2, 16, 32))], "DS", False, []),
        ([((96, 3), (2, 16, 32))], None, True, []),
        ([((96, 3), (2, 16, 32))], None, False, ["none with NixlConnector and toy"]),
        ([((96, 3), (2, 16, 32))], "SD", True, ["SD with NixlConnector and toy"]),
        ([((96, 3),)], "DS", True, ["NixlConnector and states of (96, 3) in toy"]),
        (
            [((96, 3), (2, 16, 32)), ((96, 3), (4, 16, 32))],
            "DS",
            True,
            ["NixlConnector and states of (96, 3) and (2, 16, 32) or (96, 3) and (4, 16, 32) in toy"],
        ),
    ],
)
def test_states_that_vllm_does_not_move_are_refused(kinds, layout, is_cpu, refused, monkeypatch):
    from vllm import envs as vllm_envs
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    if len(kinds) > 1:
        model = SimpleNamespace(get_mamba_specs_from_config=lambda _: [SimpleNamespace(shapes=each) for each in kinds])
    else:
        model = SimpleNamespace(get_mamba_state_shape_from_config=lambda _: kinds[0])
    monkeypatch.setattr(type(ModelRegistry), "resolve_model_cls", lambda *_, **__: (model, "Toy"))
    monkeypatch.setattr(vllm_envs, "VLLM_SSM_CONV_STATE_LAYOUT", layout, raising=False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: is_cpu)
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=True, model="toy", architecture="Toy"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        kv_transfer_config=KVTransferConfig(kv_role="kv_producer", kv_connector="NixlConnector"),
    )
    found = page_facts.refused_transfers(config)
    assert [problem.rpartition(", but got ")[2] for problem in found] == refused
