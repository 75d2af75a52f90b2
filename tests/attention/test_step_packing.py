"""Which layers' tokens wait for the end of a step, and what happens where a model does not call all layers."""

import gc
from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import override_forward_context

from vllm_kvtuner.attention import impl, step_packing
from vllm_kvtuner.attention.step_packing import StepPacking
from vllm_kvtuner.attention.window_cache import RecentCache, RecentMetadataBuilder
from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.kernels import choice, gpu
from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits, Span
from vllm_kvtuner.kernels.cuda.keep_rows import keep_rows
from vllm_kvtuner.kernels.cuda.pack_rows import pack_rows
from vllm_kvtuner.kernels.gpu import GpuKernels
from vllm_kvtuner.kernels.trial import Verdict
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.profile import LayerPrecision, RecentWindow, TransformSettings

DRAFTED = 3
WINDOW = RecentWindow(24)
FEEDBACK = RoundFeedback(torch.eye(64).expand(2, 64, 64).half(), {2: (1.0,), 4: (1.0,)})
LAYERS = ("first", "second", "third")


def config(**changes):
    parts = {
        "model_config": SimpleNamespace(dtype=torch.bfloat16),
        "scheduler_config": SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        "speculative_config": SimpleNamespace(num_speculative_tokens=DRAFTED, parallel_drafting=False),
        "use_v2_model_runner": True,
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(use_ubatching=False),
        "compilation_config": SimpleNamespace(use_inductor_graph_partition=False, static_forward_context={}),
    }
    return SimpleNamespace(**parts | changes)


def forward():
    return override_forward_context(SimpleNamespace())


def step(packing, order):
    """Rows that are to be packed after each layer, which stores and attends."""
    packed = []
    for layer in order:
        packing.check()
        packing.add(layer, f"rows of the {layer}")
        packed.append(packing.attended(layer))
    return packed


@pytest.fixture
def packing():
    packing = StepPacking({})
    for layer in LAYERS:
        packing.join(layer)
    return packing


@pytest.mark.parametrize("order", [LAYERS, LAYERS[::-1]])
def test_all_layers_are_packed_when_the_last_has_attended(packing, order):
    for _ in range(2):
        with forward():
            assert step(packing, order) == [[], [], [f"rows of the {layer}" for layer in order]]


def test_a_layer_that_stores_after_others_attend_is_waited_for(packing):
    with forward():
        assert step(packing, LAYERS[:2]) == [[], []]
        packing.add("third", "rows of the third")
        assert len(packing.attended("third")) == 3


def test_a_layer_that_has_left_is_not_waited_for(packing):
    packing.leave("second")
    with forward():
        assert step(packing, ("first", "third"))[-1] == ["rows of the first", "rows of the third"]


def test_what_an_earlier_forward_has_not_packed_is_an_error(packing):
    with forward():
        step(packing, LAYERS[:2])
        packing.check()
    with forward(), pytest.raises(RuntimeError, match=r"never packed.*did not call these layers' attention: third"):
        packing.check()


def test_a_layer_that_stores_twice_is_an_error(packing):
    with forward():
        packing.add("first", "rows")
        with pytest.raises(RuntimeError, match="first has stored twice in one forward"):
            packing.add("first", "rows")


def test_attention_without_a_store_is_an_error(packing):
    """As where a graph replays the store and vLLM calls the attention."""
    with forward():
        with pytest.raises(RuntimeError, match="first has attended, but its new tokens were not stored"):
            packing.attended("first")
        packing.add("first", "rows")
    with forward(), pytest.raises(RuntimeError, match="not stored in this forward"):
        packing.attended("first")


@pytest.mark.slow
def test_layers_of_an_engine_share_one():
    mine, other = config(), config()
    first = step_packing.step_packing(mine)
    assert step_packing.step_packing(mine) is first
    assert step_packing.step_packing(other) is not first
    known = len(step_packing._PACKINGS)
    del first
    gc.collect()
    assert len(step_packing._PACKINGS) < known


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_transfer_config": SimpleNamespace()},
        {"parallel_config": SimpleNamespace(use_ubatching=True)},
        {"compilation_config": SimpleNamespace(use_inductor_graph_partition=True, static_forward_context={})},
    ],
    ids=["connector", "microbatches", "partitions by Inductor"],
)
def test_engines_in_which_layers_pack_at_once(changes):
    assert step_packing.step_packing(config()) is not None
    assert step_packing.step_packing(config(**changes)) is None


def test_breakable_graphs_pack_at_once(monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    assert step_packing.step_packing(config()) is None


def layer(monkeypatch, pair="K4V2", window=WINDOW, owner=None, **transforms):
    """A layer of an engine whose statics are bound."""
    monkeypatch.setattr(impl, "get_current_vllm_config", config)
    precision = LayerPrecision(0, PrecisionPair.parse(pair), LayerShape(2, 64), TransformSettings(), window)
    made = impl.KVTunerImpl(
        4, 64, 0.125, 2, kv_cache_dtype="kvtuner", kv_sharing_target_layer_name=owner,
        settings=impl.LayerSettings(precision, False),
    )  # fmt: skip
    if window is not None:
        made.take_window(RecentCache("layer.recent", window, 2, 64, torch.bfloat16))
    made.bind_statics(LayerTransforms(**transforms))
    return made


@pytest.mark.parametrize(
    ("settings", "late"),
    [
        ({"key_feedback": FEEDBACK}, True),
        ({"value_feedback": FEEDBACK, "window": RecentWindow(1 + DRAFTED)}, True),
        ({"value_feedback": FEEDBACK, "window": RecentWindow(DRAFTED)}, False),
        ({"key_feedback": FEEDBACK, "window": RecentWindow(24, 8)}, False),
        ({"key_feedback": FEEDBACK, "window": None}, False),
        ({"key_feedback": FEEDBACK, "owner": "another"}, False),
        ({"key_feedback": FEEDBACK, "pair": "K8V2"}, False),
        ({"range_search": True}, False),
    ],
    ids=str,
)
def test_layers_whose_tokens_wait(monkeypatch, settings, late):
    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "reference")  # compiled ones store at once
    made = layer(monkeypatch, **settings)
    assert (made._late is not None) == late
    if late:
        packing = made._late.packing
        assert packing._members == {"layer.recent"}
        made.bind_statics(LayerTransforms())  # as a switched engine's layer
        assert made._late is None and not packing._members


@pytest.mark.parametrize(
    ("capability", "failure", "pair", "known", "late"),
    [
        ((9, 0), None, "K4V2", FEEDBACK, True),
        ((8, 0), None, "K8V4", FEEDBACK, True),
        ((9, 0), "a bad card", "K4V2", FEEDBACK, False),
        ((7, 5), None, "K4V2", FEEDBACK, False),
        (None, None, "K4V2", FEEDBACK, False),
        ((9, 0), None, "K4V8", FEEDBACK, False),
        ((9, 0), None, "K4V2", None, False),
    ],
)
def test_layers_on_gpus_whose_tokens_wait(capability, failure, pair, known, late, monkeypatch):
    """Where CUDA's kernels serve, and pass the self-test of a layer with a window; Triton's store at once."""
    proved = []
    monkeypatch.setattr(choice, "device_capability", lambda device: capability)
    monkeypatch.setattr(gpu, "prove", lambda cases, device: proved.extend(cases) or Verdict(failure))
    kernels = GpuKernels(AttentionShape(4, 2, 64, 0.125), Span(None, 24), BatchLimits(8, 1), torch.device("cpu"), True)
    parts = kernels.late_packing(PrecisionPair.parse(pair), LayerTransforms(value_feedback=known))
    assert (parts is not None) == late
    assert all(case.window_block_size and case.transforms == ("value_round_feedback",) for case in proved)
    if late:
        assert proved and parts == (keep_rows, pack_rows)
        monkeypatch.setenv("KVTUNER_DECODE_KERNEL", "triton")
        assert kernels.late_packing(PrecisionPair.parse(pair), LayerTransforms(value_feedback=known)) is None


@pytest.mark.parametrize(("query_len", "holds"), [(1, True), (1 + DRAFTED, True), (2 + DRAFTED, False)])
def test_a_window_holds_steps_whose_requests_have_as_few_tokens_as_a_decode(query_len, holds):
    spec = RecentSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=24,
        step_tokens=1 + 2 * DRAFTED, num_steps=1,
    )  # fmt: skip
    builder = RecentMetadataBuilder(spec, ["layer.recent"], config(), torch.device("cpu"))
    slots = torch.arange(8, 8 + query_len)
    common = SimpleNamespace(
        max_query_len=query_len, num_reqs=1, slot_mapping=slots, block_table_tensor=torch.zeros(1, 1)
    )
    metadata = builder.build(0, common)
    assert metadata.holds_step == holds
    assert (metadata.slot_mapping >= 0).all() == holds, "of a longer step, the null block's places are not stored"
