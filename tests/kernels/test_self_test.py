"""What the self-test of kernels lets pass, and what it finds."""

import dataclasses
import math
import time

import pytest
import torch

from tests.helpers import cuda_emulator
from vllm_kvtuner.kernels import choice, gpu, self_test
from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits, Span
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.kernels.self_test_cases import Case, random_transforms, transform_names
from vllm_kvtuner.kernels.self_test_errors import DECODE_LIMIT, FEEDBACK_LIMIT, GATHER_LIMIT, LSE_LIMIT, STORE_LIMIT
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.profile import TRANSFORM_KEYS

CPU = torch.device("cpu")
WINDOW = {"span": Span(None, 40, 4), "write_lse": True, "window_block_size": 32}


def case(pair="K4V4", head_size=64, limits=(20, 3), block_size=16, soft_cap=0.0, sinks=None, **fields):
    layout = PageLayout(PrecisionPair.parse(str(pair)), head_size, block_size)
    shape = AttentionShape(8, 2, head_size, head_size**-0.5, soft_cap, sinks)
    return Case(layout, shape, BatchLimits(*limits), **fields)


def measure_reference(tested, kernels=ReferenceKernels):
    return self_test.measure(tested, kernels(tested.shape, tested.span), CPU)


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", QUANTIZED_PAIRS, ids=str)
@pytest.mark.parametrize("transforms", [(), TRANSFORM_KEYS], ids=["plain", "all transforms"])
def test_the_reference_passes(pair, transforms):
    assert measure_reference(case(pair, transforms=transforms)).problem is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "tested",
    [
        case(**WINDOW),
        case("K4V2", transforms=("key_offset", "key_round_feedback", "value_round_feedback"), **WINDOW),
        case(span=Span(100), block_size=64, soft_cap=30.0),
        case("K2V2", 128, dtype=torch.float16, limits=(1, 1)),
        case("K4V2", transforms=TRANSFORM_KEYS, **WINDOW),
        case("K8V8", transforms=("key_offset",), span=Span(200, 17), write_lse=True),
        case("K4V4", sinks=torch.bfloat16, **WINDOW),
    ],
    ids=[
        "recent window",
        "packed late",
        "sliding window",
        "fp16",
        "all transforms",
        "windows and offset",
        "attention sinks",
    ],
)
def test_the_reference_passes_in_every_kind_of_layer(tested):
    assert measure_reference(tested).problem is None


@pytest.mark.slow
def test_one_and_several_tokens_are_decoded_in_few_and_many_requests():
    """Requests and the tokens of the longest; the same that kernels are warmed up with, and their scratch has room."""
    seen = []

    class Watched(ReferenceKernels):
        def attend(self, query, queries, *rest):
            seen.append((queries.num_reqs, int(queries.query_start_loc.diff().max())))
            assert (queries.seq_lens == 0).sum() == (queries.num_reqs > 1)
            super().attend(query, queries, *rest)

    measure_reference(case(limits=(300, 4)), Watched)
    assert set(seen) == {(1, 1), (256, 1), (1, 4), (256, 4), (1, MAX_DECODE_QUERY_LEN)}


@pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))
@pytest.mark.slow
@pytest.mark.parametrize(
    "tested",
    [
        case("K2V2", transforms=TRANSFORM_KEYS),
        case("K4V2", transforms=("key_hadamard", "key_round_feedback"), **WINDOW),
        case(limits=(3, 16)),
        case(sinks=torch.bfloat16, **WINDOW),
    ],
    ids=["all transforms", "recent window", "as many tokens as may be", "attention sinks"],
)
def test_the_cuda_kernels_pass_emulated(tested, monkeypatch):
    cuda_emulator.install(monkeypatch)
    monkeypatch.setattr(choice, "device_capability", lambda device: (9, 0))
    errors = gpu.measure_cuda(tested, CPU)
    assert errors.problem is None
    assert errors.decode < DECODE_LIMIT / 5, "the limit leaves room for a card's own rounding"


@pytest.mark.gpu
@pytest.mark.parametrize("pair", QUANTIZED_PAIRS, ids=str)
def test_the_cuda_kernels_pass(pair, device, record_property):
    """``record_property`` keeps for ``--junit-xml`` how long a compiled one takes."""
    shape = AttentionShape(32, 8, 128, 128**-0.5)
    late = {"transforms": TRANSFORM_KEYS, **WINDOW}
    sinks = {"shape": shape._replace(sinks=torch.bfloat16), **WINDOW}
    for fields in ({"transforms": TRANSFORM_KEYS}, WINDOW, late, {"span": Span(1024)}, sinks):
        plain = {"layout": PageLayout(pair, 128, 16), "shape": shape, "limits": BatchLimits(256, 4)}
        tested = Case(**{**plain, **fields})
        errors = gpu.measure_cuda(tested, device)
        assert errors.problem is None, errors
        again = gpu.measure_cuda(tested, device)
        record_property("milliseconds", round(1000 * again.seconds, 1))
        print(f"{tested}: {again}")


@pytest.mark.slow
def test_random_numbers_and_defaults_stay_as_they_were():
    """And those that vLLM has while it loads a model do not change what is computed."""
    expected = measure_reference(case("K8V8"))
    torch.manual_seed(1)
    number = torch.rand(3)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = measure_reference(case("K8V8"))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), number)
    assert got.store == expected.store and got.gather == expected.gather


STORE, GATHER, ATTEND = ReferenceKernels.store, ReferenceKernels.gather, ReferenceKernels.attend


def swap_codes(self, key, value, *rest):
    STORE(value, key, *rest)


def miss_a_token(self, key, value, slots, *rest):
    STORE(key, value, slots.index_fill(0, slots.argmax(), -1), *rest)


def store_what_has_no_slot(self, key, value, slots, *rest):
    STORE(key, value, slots.clamp(min=0), *rest)


def write_a_byte_beside(self, key, value, slots, positions, pages, window):
    STORE(key, value, slots, positions, pages, window)
    pages.kv_cache[0, 0, 0, 0] = 7


def write_beyond_the_kv_heads(self, key, value, slots, positions, pages, window):
    """Into what stands between two blocks."""
    STORE(key, value, slots, positions, pages, window)
    heads = pages.kv_cache.shape[1]
    pages.kv_cache.as_strided((1,), (1,), heads * pages.kv_cache.stride(1)).fill_(0)


def forget_transforms(self, key, value, slots, positions, pages, window):
    STORE(key, value, slots, positions, pages._replace(transforms=LayerTransforms()), window)


def forget_the_window(self, key, value, slots, positions, pages, window):
    STORE(key, value, slots, positions, pages, None)


def gather_the_wrong_tokens(self, pages, tokens, *outputs):
    GATHER(pages, tokens._replace(block_table=tokens.block_table.roll(1, 0)), *outputs)


def gather_from_the_first_token_on(self, pages, tokens, *outputs):
    GATHER(pages, tokens._replace(seq_starts=torch.zeros_like(tokens.seq_starts)), *outputs)


def gather_a_row_too_many(self, pages, tokens, key_out, value_out):
    GATHER(pages, tokens, key_out, value_out)
    key_out[tokens.num_tokens] = 0


def attend_to_one_token_less(self, query, queries, *rest):
    ATTEND(self, query, queries._replace(seq_lens=(queries.seq_lens - 1).clamp(min=0)), *rest)


def attend_to_the_next_request(self, query, queries, *rest):
    ATTEND(self, query, queries._replace(block_table=queries.block_table.roll(1, 0)), *rest)


def fail_the_second_time(self, query, queries, pages, output, *rest):
    ATTEND(self, query, queries, pages, output, *rest)
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls % 2 == 0:
        output[0] += 1


def be_off_by_a_sum(self, query, queries, pages, output, lse):
    ATTEND(self, query, queries, pages, output, lse)
    lse += 0.1


def write_nothing(*_):
    pass


def forget_the_sinks(self, query, queries, pages, *rest):
    ATTEND(self, query, queries, pages._replace(sinks=None), *rest)


def count_the_sinks_twice(self, query, queries, pages, *rest):
    ATTEND(self, query, queries, pages._replace(sinks=pages.sinks + math.log(2)), *rest)


def round_to_nearest(self, key, value, slots, positions, pages, window):
    nearest = dataclasses.replace(pages.transforms, key_feedback=None, value_feedback=None)
    STORE(key, value, slots, positions, pages._replace(transforms=nearest), window)


def spoil_one_row(self, key, value, slots, positions, pages, window):
    STORE(key, value, slots, positions, pages, window)
    if (slots >= 0).any():
        key = key.index_fill(0, slots.argmax(), 0)  # of which everything is an error
        STORE(key, value, slots, positions, pages, window)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [round_to_nearest, spoil_one_row, swap_codes, miss_a_token])
@pytest.mark.parametrize("pair", ["K4V4", "K2V2", "K8V4"])
def test_rounding_that_is_not_the_references_is_found(broken, pair, monkeypatch):
    names = ("key_hadamard", "key_round_feedback", "value_round_feedback")
    monkeypatch.setattr(ReferenceKernels, "store", broken)
    errors = measure_reference(case(pair, transforms=names))
    if pair == "K8V4" and broken is spoil_one_row:
        assert "store error" in errors.problem
    else:
        assert not errors.feedback <= 1.5 * FEEDBACK_LIMIT
        assert "feedback error" in errors.problem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "broken", "seen"),
    [
        ("store", swap_codes, "store"),
        ("store", miss_a_token, "store"),
        ("store", forget_transforms, "store"),
        ("store", store_what_has_no_slot, "stray"),
        ("store", write_a_byte_beside, "stray"),
        ("store", write_beyond_the_kv_heads, "stray"),
        ("store", forget_the_window, "stray"),
        ("gather", gather_the_wrong_tokens, "gather"),
        ("gather", gather_from_the_first_token_on, "gather"),
        ("gather", gather_a_row_too_many, "stray"),
        ("gather", write_nothing, "gather"),
        ("attend", attend_to_one_token_less, "decode"),
        ("attend", attend_to_the_next_request, "decode"),
        ("attend", fail_the_second_time, "decode"),
        ("attend", be_off_by_a_sum, "lse"),
        ("attend", write_nothing, "decode"),
        ("attend", forget_the_sinks, "decode"),
        ("attend", count_the_sinks_twice, "decode"),
    ],
)
def test_kernels_that_err_are_found(method, broken, seen, monkeypatch):
    monkeypatch.setattr(ReferenceKernels, method, broken)
    errors = measure_reference(case(transforms=("key_hadamard",), sinks=torch.float32, **WINDOW))
    limits = {"store": STORE_LIMIT, "gather": GATHER_LIMIT, "decode": DECODE_LIMIT}
    assert not getattr(errors, seen) <= 2 * limits.get(seen, LSE_LIMIT if seen == "lse" else 0)
    assert not errors.passed and f"{seen} error" in errors.problem


def forget_to_keep(late):
    return late._replace(keep_rows=write_nothing)


def forget_to_pack(late):
    return late._replace(pack_rows=write_nothing)


def pack_to_nearest(late):
    def pack_rows(layers):
        for layer in layers:
            nearest = dataclasses.replace(layer.pages.transforms, value_feedback=None)
            late.pack_rows([layer._replace(pages=layer.pages._replace(transforms=nearest))])

    return late._replace(pack_rows=pack_rows)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [forget_to_keep, forget_to_pack, pack_to_nearest])
def test_a_store_in_two_parts_that_is_not_the_store_is_found(broken, monkeypatch):
    parts = ReferenceKernels.late_packing
    monkeypatch.setattr(ReferenceKernels, "late_packing", lambda self, *of_layer: broken(parts(self, *of_layer)))
    errors = measure_reference(case(transforms=("value_round_feedback",), **WINDOW))
    assert errors.stray > 0 and "stray error" in errors.problem


@pytest.mark.slow
def test_rows_beyond_the_last_query_are_looked_at():
    """Of what stands for a GPU's kernels, which have to make them 0; the reference leaves them as they are."""

    class OnGpu:
        def __init__(self, shape, span):
            reference = ReferenceKernels(shape, span)
            self.store, self.gather, self.attend = reference.store, reference.gather, reference.attend
            self.late_packing = reference.late_packing

    errors = measure_reference(case(), OnGpu)
    assert errors.problem.startswith("decode error nan above")


def test_decoding_may_be_left_out():
    tested = case("K4V2", 96)
    kernels = ReferenceKernels(tested.shape, tested.span)
    kernels.attend = lambda *_: pytest.fail("another kernel's")
    assert self_test.measure(tested, kernels, CPU, decode=False).passed


def test_a_kind_leaves_out_what_the_cache_settles():
    first, second = case(block_size=16, window_block_size=32), case(block_size=64)
    assert first != second and first.kind == second.kind
    assert case(transforms=("key_hadamard",)).kind != first.kind
    assert case(sinks=torch.bfloat16).kind != first.kind
    assert str(case("K4V2", transforms=("key_offset",))) == "K4V2 of head size 64 with key_offset"
    assert str(case("K4V2", sinks=torch.bfloat16)) == "K4V2 of head size 64 with attention sinks"


def test_names_of_transforms_are_the_profiles():
    tested = case(transforms=TRANSFORM_KEYS)
    assert transform_names(random_transforms(TRANSFORM_KEYS, tested, CPU)) == TRANSFORM_KEYS
    assert transform_names(LayerTransforms()) == ()


@pytest.mark.slow
def test_seconds_are_measured():
    begin = time.monotonic()
    errors = measure_reference(case(limits=(1, 1)))
    assert 0 < errors.seconds <= time.monotonic() - begin
