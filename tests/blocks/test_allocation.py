"""Steps that are not asked for blocks: a request has those that it has when every step is asked for."""

import random

import pytest
import torch
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from tests.helpers.block_requests import allocate_where_needed, make_request, prefill, start
from vllm_kvtuner.blocks import allocation
from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.plugin import register

MAX_LEN = 4096
NUM_BLOCKS = 600
SHAPE = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def plugin_loaded():
    register()
    init_none_hash(sha256)


def make_manager(specs, enable_caching=True, num_blocks=NUM_BLOCKS):
    smallest = min(spec.block_size for spec in specs)
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([str(index)], spec) for index, spec in enumerate(specs)],
        ),
        max_model_len=MAX_LEN,
        scheduler_block_size=max(spec.block_size for spec in specs),
        hash_block_size=smallest,
        max_in_flight_tokens=512,
        enable_caching=enable_caching,
    )


def full(block_size):
    return FullAttentionSpec(block_size=block_size, **SHAPE)


def sliding(block_size, window):
    return SlidingWindowSpec(block_size=block_size, sliding_window=window, **SHAPE)


def recent(block_size, window, drafts, sink_tokens=0):
    return RecentSpec(
        block_size=block_size,
        sliding_window=window,
        step_tokens=1 + 2 * drafts,
        num_steps=1,
        sink_tokens=sink_tokens,
        **SHAPE,
    )


CACHES = {
    "one group": lambda drafts: [full(16)],
    "long blocks": lambda drafts: [full(128)],
    "sliding window": lambda drafts: [full(32), sliding(32, 100)],
    "recent window": lambda drafts: [full(128), recent(16, 24, drafts)],
    "recent window with sink tokens": lambda drafts: [full(128), recent(32, 200, drafts, sink_tokens=4)],
    "recent window, long blocks": lambda drafts: [full(128), recent(128, 64, drafts)],
    "all": lambda drafts: [full(128), sliding(128, 300), recent(16, 64, drafts, sink_tokens=4)],
}
"""Groups of a cache by what drafts a step has."""


def counted(monkeypatch, owner, name):
    """A list that grows with every call of the method."""
    calls = []
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


def counted_allocations(monkeypatch, manager):
    return counted(monkeypatch, manager.coordinator.single_type_managers[0], "get_num_blocks_to_allocate")


@pytest.mark.quick(1)
@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "none"])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seed", range(2))
def test_steps_that_need_nothing_are_not_asked(seed, cache, drafts, caching, monkeypatch):
    numbers = random.Random(seed)
    specs = CACHES[cache](drafts)
    smallest = min(spec.block_size for spec in specs)
    managers = [make_manager(specs, caching) for _ in range(2)]
    allocate_where_needed(managers[1])
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "steps_of", lambda manager: None)
        allocate_where_needed(managers[0])
    prompt = [numbers.randrange(1000) for _ in range(numbers.randrange(1, 700))]
    requests = [make_request("a", prompt, smallest) for _ in managers]
    chunk = numbers.choice([7, 100, 512])
    for manager, request in zip(managers, requests, strict=True):
        prefill(manager, request, chunk)
    asked = counted_allocations(monkeypatch, managers[1])
    told = counted(monkeypatch, managers[1].coordinator, "cache_blocks")
    for _ in range(300):
        tokens = [numbers.randrange(1000) for _ in range(1 + numbers.randrange(1 + drafts))]
        new = []
        for manager, request in zip(managers, requests, strict=True):
            request.append_output_token_ids(tokens[:1])
            ahead = {"num_lookahead_tokens": drafts}
            new.append(manager.allocate_slots(request, 1 + drafts, **ahead).get_block_ids())
            request.append_output_token_ids(tokens[1:])
            request.num_computed_tokens += len(tokens)
            manager.cache_blocks(request, request.num_computed_tokens)
        assert [len(ids) for ids in new[0]] == [len(ids) for ids in new[1]]
        for every, some in zip(*(manager.coordinator.single_type_managers for manager in managers), strict=True):
            blocks = [[block.is_null for block in each.req_to_blocks["a"]] for each in (every, some)]
            assert blocks[0] == blocks[1]
            assert every.num_cached_block == some.num_cached_block
    assert len(asked) < (60 if drafts == 0 else 200)
    assert len(told) < (80 if drafts == 0 else 260)
    found = []
    for manager, request in zip(managers, requests, strict=True):
        again = make_request("b", request.all_token_ids, smallest)
        manager.free(request)
        found.append(start(manager, again)[1])
        assert manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert found[0] == found[1] and (found[0] > 0) == caching


def test_a_request_that_lost_its_blocks_gets_new_ones():
    """A preempted request comes back with the tokens it had, and asks as one that begins."""
    manager = make_manager([full(16)])
    allocate_where_needed(manager)
    request = make_request("a", range(40), 16)
    prefill(manager, request, 512)
    for _ in range(3):
        request.append_output_token_ids(1)
        manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        request.num_computed_tokens += 1
    manager.free(request)
    manager.reset_prefix_cache()
    request.num_computed_tokens = 0
    blocks, hit = start(manager, request)
    new = manager.allocate_slots(request, 43, num_new_computed_tokens=hit, new_computed_blocks=blocks)
    assert len(new.get_block_ids()[0]) == 3
    request.num_computed_tokens = 43
    request.append_output_token_ids(1)
    assert not manager.allocate_slots(request, 1, num_lookahead_tokens=0).get_block_ids()[0]


def test_where_blocks_run_out_the_request_asks_again():
    manager = make_manager([full(16)], num_blocks=12)
    allocate_where_needed(manager)
    greedy, small = (make_request(name, range(length), 16) for name, length in (("greedy", 160), ("small", 16)))
    for request in (greedy, small):
        assert manager.allocate_slots(request, request.num_prompt_tokens) is not None
        request.num_computed_tokens = request.num_prompt_tokens
    small.append_output_token_ids(1)
    for _ in range(2):
        assert manager.allocate_slots(small, 1, num_lookahead_tokens=0) is None
    manager.free(greedy)
    assert len(manager.allocate_slots(small, 1, num_lookahead_tokens=0).get_block_ids()[0]) == 1


def test_states_of_linear_attention_are_asked_in_every_step(monkeypatch):
    states = MambaSpec(block_size=64, shapes=((4, 4),), dtypes=(torch.float32,))
    manager = make_manager([full(64), states], enable_caching=False)
    allocate_where_needed(manager)
    request = make_request("a", range(5), 64)
    prefill(manager, request, 512)
    asked = counted_allocations(monkeypatch, manager)
    for _ in range(20):
        request.append_output_token_ids(1)
        manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        request.num_computed_tokens += 1
    assert len(asked) >= 20
