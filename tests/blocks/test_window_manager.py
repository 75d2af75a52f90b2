"""Blocks of recent windows in vLLM's own block pool: what steps and hits read is there, and no more is held."""

import random

import pytest
import torch
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from tests.helpers.block_requests import allocate_where_needed, make_request, prefill, start
from vllm_kvtuner.blocks.window_manager import RecentManager, RecentSpec
from vllm_kvtuner.plugin import register

BLOCK_SIZE = 128
MAX_LEN = 4096
SHAPE = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def plugin_loaded():
    register()
    init_none_hash(sha256)


def recent_spec(window, block_size, num_steps=1, drafts=0, sink_tokens=0):
    return RecentSpec(
        block_size=block_size,
        sliding_window=window,
        step_tokens=1 + 2 * drafts,
        num_steps=num_steps,
        sink_tokens=sink_tokens,
        **SHAPE,
    )


def make_manager(spec, num_blocks, max_in_flight_tokens, enable_caching=True):
    groups = [
        KVCacheGroupSpec(["packed"], FullAttentionSpec(block_size=BLOCK_SIZE, **SHAPE)),
        KVCacheGroupSpec(["window"], spec),
    ]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=MAX_LEN,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=spec.block_size,
        max_in_flight_tokens=max_in_flight_tokens,
        enable_caching=enable_caching,
    )
    allocate_where_needed(manager)
    return manager


def window_manager(manager):
    (window,) = (m for m in manager.coordinator.single_type_managers if isinstance(m, RecentManager))
    return window


def is_held(manager, request, first, last):
    """Whether all tokens first .. last - 1 have blocks in the window's cache."""
    window = window_manager(manager)
    blocks = window.req_to_blocks[request.request_id]
    return all(not blocks[token // window.block_size].is_null for token in range(max(first, 0), last))


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_steps_find_what_they_read_in_the_smallest_pool(seed, num_steps, drafts, sink_tokens):
    """Chunks and decodes of any size, in a pool that start-up lets pass for one request; rejected drafts roll back."""
    numbers = random.Random(seed)
    window, block_size, chunk = (
        numbers.choice([1, 24, 64, 200]),
        numbers.choice([16, 32, 128]),
        numbers.choice([48, 700]),
    )
    spec = recent_spec(window, block_size, num_steps, drafts, sink_tokens)
    in_flight_tokens = num_steps * chunk
    most = spec.max_admission_blocks_per_request(in_flight_tokens, MAX_LEN)
    length = 1500
    manager = make_manager(spec, 1 + -(-length // BLOCK_SIZE) + most, in_flight_tokens)
    request = make_request("a", [numbers.randrange(1000) for _ in range(length - 600)], block_size)
    start(manager, request)
    pool, held = manager.block_pool, window_manager(manager)
    everything = pool.get_num_free_blocks()
    flying: list[tuple[int, int]] = []
    done = 0
    while done < length - drafts:
        prompt = request.num_prompt_tokens
        count = min(numbers.randint(1, chunk), prompt - done) if done < prompt else 1 + drafts
        if done >= prompt:
            while request.num_tokens < done + 1:
                request.append_output_token_ids(numbers.randrange(1000))
        request.num_in_flight_tokens = sum(end - begin for begin, end in flying)
        ahead = {"num_lookahead_tokens": drafts} if done >= prompt else {}
        assert manager.allocate_slots(request, count, **ahead) is not None
        flying.append((done, done + count))
        for begin, end in flying:
            assert is_held(manager, request, begin - window + 1, begin)
            assert is_held(manager, request, end - window, end)
            assert is_held(manager, request, 0, min(sink_tokens, end))
        decoding = [end - begin for begin, end in flying] == [1 + drafts] * num_steps
        own = sum(not block.is_null for block in held.req_to_blocks["a"])
        assert own <= (spec.decode_blocks + num_steps - 1 if decoding and done > prompt + 250 else most)
        rejected = numbers.randint(0, drafts) if done >= prompt else 0
        done += count - rejected
        flying = flying[-(num_steps - 1) :] if num_steps > 1 else []
        request.num_computed_tokens = done
    manager.free(request)
    assert pool.get_num_free_blocks() == everything


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("chunk", [MAX_LEN, 512, 100])
@pytest.mark.parametrize("length", [129, 256, 1000])
def test_a_prompt_is_found_again(length, chunk, sink_tokens):
    """Up to the last whole block before its end, and a longer one up to its last whole block."""
    manager = make_manager(recent_spec(64, 32, sink_tokens=sink_tokens), 200, chunk)
    prompt = random.Random(length).choices(range(1000), k=length)
    for name, tokens, expected in (
        ("first", prompt, 0),
        ("again", prompt, (length - 1) // BLOCK_SIZE * BLOCK_SIZE),
        ("longer", prompt + [1] * 40, length // BLOCK_SIZE * BLOCK_SIZE),
    ):
        request = make_request(name, tokens, 32)
        assert prefill(manager, request, chunk) == expected
        assert is_held(manager, request, 0, sink_tokens)
        manager.free(request)


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_a_shared_prefix_is_found_once_two_have_shown_it(sink_tokens):
    manager = make_manager(recent_spec(64, 32, sink_tokens=sink_tokens), 400, MAX_LEN)
    numbers = random.Random(0)
    shared = numbers.choices(range(1000), k=1100)
    hits = []
    for name in "abc":
        request = make_request(name, shared + numbers.choices(range(1000), k=700), 32)
        hits.append(prefill(manager, request, MAX_LEN))
        assert is_held(manager, request, request.num_tokens - 64, request.num_tokens)
        manager.free(request)
    assert hits == [0, 0, 1024]


def test_a_hit_ends_where_the_window_has_what_it_needs():
    """After the pool has taken the window's blocks, the packed pages alone are no hit."""
    manager = make_manager(recent_spec(64, 32), 400, MAX_LEN)
    prompt = list(range(1000))
    request = make_request("first", prompt, 32)
    prefill(manager, request, MAX_LEN)
    blocks = window_manager(manager).req_to_blocks["first"]
    taken = {block.block_id for block in blocks if not block.is_null}
    manager.free(request)
    manager.evict_blocks(taken)
    assert prefill(manager, make_request("again", prompt, 32), MAX_LEN) == 0


def test_a_hit_needs_the_sink_tokens():
    """The block that holds them is the request's from its first step to its end, shared by those that hit it."""
    manager = make_manager(recent_spec(64, 32, sink_tokens=4), 400, MAX_LEN)
    everything = manager.block_pool.get_num_free_blocks()
    prompt = list(range(1000))
    first, again = (make_request(name, prompt, 32) for name in ("first", "again"))
    prefill(manager, first, 300)
    (kept, *_) = window_manager(manager).req_to_blocks["first"]
    assert prefill(manager, again, MAX_LEN) == 896
    assert window_manager(manager).req_to_blocks["again"][0] is kept
    manager.free(first)
    assert kept.ref_cnt == 1
    manager.free(again)
    assert kept.ref_cnt == 0
    assert manager.block_pool.get_num_free_blocks() == everything

    manager.evict_blocks({kept.block_id})
    last = make_request("last", prompt, 32)
    assert prefill(manager, last, MAX_LEN) == 0
    manager.free(last)
    assert prefill(manager, make_request("found", prompt, 32), MAX_LEN) == 896


def test_no_block_of_a_window_with_sink_tokens_is_taken_out_of_block_tables():
    """As model runner V2 would do by this number, with all that lies before the window."""
    assert recent_spec(64, 32).num_retained_tokens == 63
    assert recent_spec(64, 32, sink_tokens=4).num_retained_tokens == 0


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_what_a_hit_takes_is_what_is_counted(sink_tokens):
    """Else allocation would fail with requests running: blocks that are found leave the free ones."""
    manager = make_manager(recent_spec(64, 32, sink_tokens=sink_tokens), 400, MAX_LEN)
    prompt = list(range(1000))
    first, again = (make_request(name, prompt, 32) for name in ("first", "again"))
    prefill(manager, first, MAX_LEN)
    manager.free(first)
    found, hit = start(manager, again)
    assert hit == 896
    counted = sum(
        each.get_num_blocks_to_allocate("again", 1000, blocks, hit, hit, 1000)
        for each, blocks in zip(manager.coordinator.single_type_managers, found.blocks, strict=True)
    )
    free = manager.block_pool.get_num_free_blocks()
    manager.allocate_slots(again, 1000 - hit, num_new_computed_tokens=hit, new_computed_blocks=found)
    assert free - manager.block_pool.get_num_free_blocks() == counted


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_what_a_connector_loads_has_blocks_sink_tokens_too(sink_tokens):
    """As many as are counted; and the prefix cache finds all of it later."""
    manager = make_manager(recent_spec(64, 32, sink_tokens=sink_tokens), 400, MAX_LEN)
    everything = manager.block_pool.get_num_free_blocks()
    prompt, loaded = list(range(1000)), 896
    request = make_request("first", prompt, 32)
    found, hit = start(manager, request)
    assert hit == 0
    counted = sum(
        each.get_num_blocks_to_allocate("first", loaded, blocks, loaded, 0, loaded)
        for each, blocks in zip(manager.coordinator.single_type_managers, found.blocks, strict=True)
    )
    free = manager.block_pool.get_num_free_blocks()
    manager.allocate_slots(
        request, 0, new_computed_blocks=found, num_external_computed_tokens=loaded, delay_cache_blocks=True
    )
    assert free - manager.block_pool.get_num_free_blocks() == counted == loaded // BLOCK_SIZE + 2 + bool(sink_tokens)
    assert is_held(manager, request, loaded - 63, loaded)
    assert is_held(manager, request, 0, sink_tokens)
    request.num_computed_tokens = loaded
    manager.cache_blocks(request, loaded)
    assert manager.allocate_slots(request, 1000 - loaded) is not None
    again = make_request("again", prompt, 32)
    assert prefill(manager, again, MAX_LEN) == loaded
    manager.free(request)
    manager.free(again)
    assert manager.block_pool.get_num_free_blocks() == everything


def test_a_chunk_holds_no_more_than_what_is_read_later():
    spec = recent_spec(64, 32, sink_tokens=4)
    manager = make_manager(spec, 400, MAX_LEN, enable_caching=False)
    request = make_request("a", range(3000), 32)
    free = manager.block_pool.get_num_free_blocks()
    prefill(manager, request, MAX_LEN)
    packed = -(-3000 // BLOCK_SIZE)
    assert free - manager.block_pool.get_num_free_blocks() <= packed + spec.decode_blocks
