"""The CUDA store in two parts: bytes are those of the store at once, lane by lane on a CPU, on a card (``gpu``), and
what the compiler makes of it."""

import ctypes
import dataclasses

import pytest
import torch

from tests.helpers import cuda_emulator
from tests.helpers.cubin import instructions, resource_usage
from tests.helpers.paged_cache import make_layout, random_transforms, rotary_table
from tests.kernels.cuda.test_build import SHARED_BYTES_OF_A_CTA
from tests.kernels.cuda.test_feedback_store import feedback as flat_feedback
from tests.kernels.triton.test_feedback_store import feedback, seed
from tests.kernels.triton.test_reshape_and_cache import empty_pages, random_slots, tokens
from vllm_kvtuner.kernels.contract import StepRows, WindowRows
from vllm_kvtuner.kernels.cuda import keep_rows as cuda_keep
from vllm_kvtuner.kernels.cuda import pack_rows as cuda_pack
from vllm_kvtuner.kernels.cuda import reshape_and_cache as cuda_store
from vllm_kvtuner.kernels.cuda.build import compile_cubin
from vllm_kvtuner.kernels.cuda.feedback_store import FeedbackVariant
from vllm_kvtuner.kernels.cuda.rows import RowVariant, StoreVariant, wide_lanes
from vllm_kvtuner.kernels.reference.rows import store_rows_ref

__all__ = ["seed"]

CPU = torch.device("cpu")
BLOCKS, WINDOW_BLOCKS, WINDOW_BLOCK_SIZE = 6, 5, 32


class Layer:
    """A layer that stores at once and in two parts, each in a cache of its own, poisoned.

    Args:
        pair: of the layer, as a string.
        device: of its caches.
        ranges: that are tried for keys and values, 0 for nearest codes.
        heads, size, dtype: of rows.
        transformed: keys have an offset and equalization, and both sides are rotated.
    """

    def __init__(self, pair, device, ranges=(1, 1), heads=2, size=64, dtype=torch.bfloat16, transformed=False):
        transforms = random_transforms(
            heads, size, device, rotary_table(size, True, 4096, device), 5.0 * transformed, transformed,
            key_hadamard=transformed, value_hadamard=True,
        )  # fmt: skip
        keys, values = (feedback(size, heads, count, device) if count else None for count in ranges)
        transforms = dataclasses.replace(transforms, key_feedback=keys, value_feedback=values)
        self.pages, self.want = (
            empty_pages(make_layout(pair, size), BLOCKS, heads, device, transforms) for _ in range(2)
        )
        # Neighbours in memory are another layer's.
        shape = (WINDOW_BLOCKS, heads + 2, WINDOW_BLOCK_SIZE, 2 * size)
        self.memory, self.want_memory = (torch.full(shape, 7.0, device=device, dtype=dtype) for _ in range(2))
        self.heads, self.size, self.dtype, self.device = heads, size, dtype, device

    def window(self, memory, slots):
        return WindowRows(memory[:, 1 : 1 + self.heads], slots)

    def store(self, slots, window_slots, positions):
        """Random tokens, at once and the first part of two; gives what waits to be packed."""
        key, value = tokens(len(slots) + 2, self.heads, self.size, self.dtype, self.device)
        at_once = self.window(self.want_memory, window_slots)
        cuda_store.reshape_and_cache(key, value, slots, positions, self.want, at_once)
        kept = self.window(self.memory, window_slots)
        cuda_keep.keep_rows(key, value, kept)
        return StepRows(self.pages, kept, slots, positions)

    def check(self):
        assert torch.equal(self.pages.kv_cache._base, self.want.kv_cache._base)
        assert torch.equal(self.memory, self.want_memory)


def step(count, device, without=()):
    """Slots in the pages and in the window of as many tokens, and positions; some have none of either."""
    slots = random_slots(count, BLOCKS * 16, device)
    window_slots = random_slots(count, WINDOW_BLOCKS * WINDOW_BLOCK_SIZE, device)
    for index in without:
        slots[index] = window_slots[index] = -1
    return slots, window_slots, torch.randint(0, 4096, (count,), device=device)


def check_packed(layers, steps):
    """``layers`` store a step each and are packed together."""
    before = [layer.pages.kv_cache._base.clone() for layer in layers]
    waiting = [layer.store(*of_layer) for layer, of_layer in zip(layers, steps, strict=True)]
    for layer, bytes_before in zip(layers, before, strict=True):
        assert torch.equal(layer.pages.kv_cache._base, bytes_before), "the first part leaves pages alone"
    cuda_pack.pack_rows(waiting)
    for layer in layers:
        layer.check()


class _TwoParts:
    """By the variant for few rows and the one for many, whichever the store at once took."""

    @pytest.fixture(autouse=True, params=["few_rows", "many_rows"])
    def variant(self, request, monkeypatch):
        few = request.param == "few_rows"
        monkeypatch.setattr(cuda_pack, "most_lanes", lambda size, _: 32 if few else wide_lanes(size))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("pair", "ranges", "fields"),
        [
            ("K4V2", (1, 1), {"heads": 3}),
            ("K2V2", (3, 2), {"transformed": True}),
            ("K4V4", (0, 2), {"dtype": torch.float16}),
            ("K4V8", (1, 0), {"dtype": torch.float32, "size": 32}),
            ("K4V2", (2, 1), {"size": 256, "heads": 1}),
        ],
        ids=str,
    )
    def test_one_layer(self, pair, ranges, fields, device):
        """An odd count of tokens, some without a slot, of which one group of 16 has none."""
        layer = Layer(pair, device, ranges, **fields)
        check_packed([layer], [step(49, device, without=(0, 5, *range(16, 32), 40))])

    @pytest.mark.slow
    def test_layers_of_a_launch_keep_apart(self, device):
        """Their statics, caches, windows, slots and positions; the last CTA's share is less."""
        layers = [Layer("K4V2", device, (2, 1), transformed=True) for _ in range(5)]
        first, second = step(21, device, without=(3,)), step(21, device, without=(20,))
        check_packed(layers, [first, second, first, second, step(21, device)])

    @pytest.mark.slow
    def test_unlike_layers_take_launches_of_their_own(self, device):
        """By pair, sides, ranges, heads and number of tokens."""
        layers = [
            Layer("K4V2", device),
            Layer("K2V2", device),
            Layer("K4V2", device),
            Layer("K4V2", device, (1, 0), heads=1),
            Layer("K4V2", device),
        ]
        first, second = step(19, device), step(33, device, without=(32, 7))
        check_packed(layers, [first, first, second, second, first])

    def test_more_layers_than_a_launch_has_room_for(self, device, monkeypatch):
        monkeypatch.setattr(cuda_pack, "MAX_LAYERS", 3)
        check_packed([Layer("K2V2", device, heads=1, size=32) for _ in range(7)], [step(5, device)] * 7)

    def test_nothing_to_pack(self, device):
        layer = Layer("K4V2", device)
        check_packed([layer], [step(20, device, without=range(20))])
        check_packed([layer], [step(0, device)])
        cuda_pack.pack_rows([])

    def test_a_token_without_a_place_in_the_window_is_not_packed(self, device):
        layer = Layer("K4V2", device)
        slots, window_slots, positions = step(18, device)
        window_slots[[4, 17]] = -1
        waiting = layer.store(slots, window_slots, positions)
        layer.want.kv_cache.copy_(layer.pages.kv_cache)
        wanted = slots.clone()
        wanted[[4, 17]] = -1
        cuda_pack.pack_rows([waiting])
        cuda_pack.pack_rows([waiting._replace(pages=layer.want, slot_mapping=wanted)])
        layer.check()


@pytest.mark.quick(1)
@pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))
class TestEmulated(_TwoParts):
    @pytest.fixture
    def device(self, monkeypatch):
        cuda_emulator.install(monkeypatch)
        return CPU

    @pytest.mark.slow
    def test_layers_alike_share_launches(self, device, monkeypatch):
        """One launch for 32 of them, and the card's CTAs are shared out."""
        grids = []
        monkeypatch.setattr(cuda_emulator.EmulatedKernel, "max_ctas", 64)
        monkeypatch.setattr(
            cuda_emulator.EmulatedKernel, "launch", lambda self, grid, *_: grids.append((grid, self.block))
        )
        slots, window_slots, positions = step(20, device)
        layers = [Layer("K4V2", device) for _ in range(40)]
        waiting = [
            StepRows(layer.pages, layer.window(layer.memory, window_slots), slots, positions) for layer in layers
        ]
        cuda_pack.pack_rows(waiting[:32])
        cuda_pack.pack_rows(waiting)
        assert grids == [(2 * 32, 128), (3 * 20, 128), (3 * 20, 128)]


@pytest.mark.gpu
class TestOnACard(_TwoParts):
    def test_a_decode_step(self, device):
        """As many layers and requests as fill a card, in a CUDA graph that was captured at other slots."""
        layers = [Layer("K4V2", device, (3, 3), heads=8, size=128, transformed=True) for _ in range(33)]
        slots, window_slots, positions = step(64, device)
        waiting = [layer.store(slots, window_slots, positions) for layer in layers]
        cuda_pack.pack_rows(waiting)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda_pack.pack_rows(waiting)
        for given, new in zip((slots, window_slots, positions), step(64, device, without=(1, 60)), strict=True):
            given.copy_(new)
        for layer in layers:
            layer.store(slots, window_slots, positions)
        graph.replay()
        for layer in layers:
            layer.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))
def test_rows_are_kept_as_they_are(dtype, monkeypatch):
    """Of more tokens than CTAs take at a time; where tokens and slots are not as many, of the fewer."""
    cuda_emulator.install(monkeypatch)
    key, value = tokens(70, 3, 96, dtype, CPU)
    memory = torch.full((4, 5, 32, 192), 7.0, dtype=dtype)
    want = memory.clone()
    slots = random_slots(75, 4 * 32, CPU)
    slots[[0, 69]] = -1
    cuda_keep.keep_rows(key, value, WindowRows(memory[:, 1:4], slots))
    store_rows_ref(key, value, WindowRows(want[:, 1:4], slots[:70]))
    assert torch.equal(memory, want)
    cuda_keep.keep_rows(key[:0], value[:0], WindowRows(memory[:, 1:4], slots))
    assert torch.equal(memory, want)


def test_a_window_of_other_rows_is_refused():
    layer = Layer("K4V2", CPU)
    slots, window_slots, positions = step(3, CPU)
    for memory in (layer.memory[..., :64], layer.memory[:, :1]):
        with pytest.raises(AssertionError):
            cuda_pack.pack_rows([StepRows(layer.pages, WindowRows(memory, window_slots), slots, positions)])
    short = layer.window(layer.memory, window_slots[:2])
    with pytest.raises(AssertionError):
        cuda_pack.pack_rows([StepRows(layer.pages, short, slots, positions)])


def test_arguments_are_what_every_driver_takes():
    """4,096 bytes; CUDA 12.1 and its drivers take more. As the documentation has it, 120 of a layer."""
    assert ctypes.sizeof(cuda_pack.LAYER.structure) == 120
    assert ctypes.sizeof(cuda_pack.ARGUMENTS.structure) <= 4096


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("pair", "head_size", "ranges", "transformed", "many_rows"),
    [
        ("K4V2", 128, (3, 3), True, True),
        ("K4V2", 128, (1, 1), False, True),
        ("K4V4", 128, (1, 0), True, False),
        ("K2V2", 256, (3, 2), True, True),
    ],
)
def test_variants_compile(pair, head_size, ranges, transformed, many_rows, arch):
    """Without spills; what a layer has of its own is read from the arguments, not copied to local memory."""
    rotary = rotary_table(head_size, True, 16, CPU)
    switches = dict(key_hadamard=True, value_hadamard=True)
    transforms = random_transforms(8, head_size, CPU, rotary, 5.0 * transformed, transformed, **switches)
    keys, values = (flat_feedback(head_size, count) if count else None for count in ranges)
    transforms = dataclasses.replace(transforms, key_feedback=keys, value_feedback=values)
    rows = RowVariant(make_layout(pair, head_size), 8, torch.bfloat16, wide_lanes(head_size) if many_rows else 32)
    variant = FeedbackVariant(StoreVariant(rows, window_block_size=32), ranges)
    cubin = bytes(compile_cubin(cuda_pack.source(transforms, variant), arch, None).code)
    usage, found = resource_usage(cubin), instructions(cubin)
    print(f"{arch}: {usage['REG']} registers, {variant.shared_bytes} bytes of shared memory")
    # On sm_80 heads of 256 keep a few numbers there.
    assert usage["LOCAL"] == 0 and found["LDL"] + found["STL"] <= (8 if (arch, head_size) == ("sm_80", 256) else 0)
    assert variant.shared_bytes <= SHARED_BYTES_OF_A_CTA[arch]
    assert found["HMMA"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_keeping_rows_compiles(arch):
    source = cuda_keep.source(128, 8, torch.bfloat16, 32)
    usage = resource_usage(bytes(compile_cubin(source, arch, None).code))
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0)
