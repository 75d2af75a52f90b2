"""Configurations that are refused; tests/serving/cpu/test_refusals.py asks engines."""

from types import SimpleNamespace

import pytest
from vllm import platforms
from vllm.config import CUDAGraphMode

from vllm_kvtuner.engine import checks
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.profile import Profile, TransformSettings


@pytest.mark.parametrize(
    ("is_cpu", "attend", "bits", "refused"),
    [(False, True, 8, True), (True, True, 8, False), (False, False, 8, False), (False, True, 16, False)],
)
def test_8_bit_windows_are_refused_where_a_gpu_does_not_read_them_back(is_cpu, attend, bits, refused, monkeypatch):
    """The check is called itself: with vLLM's CPU build no engine has a GPU."""
    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)
    options = {"recent_window": 64, "recent_window_bits": bits, "attend_cached_prefill": attend}
    resolved = Profile("p", None, PrecisionPair(4, 4), **options).resolve(shape)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False))
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: is_cpu))
    problems = checks.recent_windows(config, resolved)
    assert [line.rpartition(", but got ")[2] for line in problems] == (["8"] if refused else [])


@pytest.mark.parametrize(("is_cpu", "bits"), [(False, 16), (False, 8), (True, 8)])
def test_sink_tokens_of_8_bits_are_refused_on_a_gpu(is_cpu, bits, monkeypatch):
    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)
    resolved = Profile("p", None, PrecisionPair(4, 4), recent_window=64, recent_window_bits=bits, sink_tokens=4)
    resolved = resolved.resolve(shape)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False), kv_transfer_config=None
    )
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: is_cpu))
    rule = "p: sink_tokens must be 0 on a GPU with recent_window_bits: 8, which serves them in 16 bits, but got 4"
    assert checks.recent_windows(config, resolved) == (() if is_cpu or bits == 16 else (rule,))


@pytest.mark.parametrize(
    ("mode", "splitting_ops", "breakable", "options", "got"),
    [
        pytest.param("FULL_AND_PIECEWISE", [checks.STORE_OP], "0", {"recent_window": 64}, None, id="as usual"),
        pytest.param("FULL_AND_PIECEWISE", [], "0", {}, None, id="nothing that a batch brings anew"),
        pytest.param("FULL_DECODE_ONLY", [], "0", {"recent_window": 64}, None, id="no piecewise graphs"),
        pytest.param("PIECEWISE", ["vllm::x"], "0", {"recent_window": 64}, "splitting_ops that leaves", id="window"),
        pytest.param("PIECEWISE", None, "0", {"offset": True}, "splitting_ops that leaves", id="offset"),
        pytest.param(
            "FULL_AND_PIECEWISE",
            [checks.STORE_OP],
            "1",
            {"recent_window": 64},
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1",
            id="breakable graphs",
        ),
    ],
)
def test_stores_that_piecewise_graphs_would_replay_are_refused(
    mode, splitting_ops, breakable, options, got, monkeypatch, tmp_path
):
    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)
    if options.pop("offset", False):
        options = {"transforms": TransformSettings(key_offset=True), "statics": tmp_path / "any.safetensors"}
    resolved = Profile("p", None, PrecisionPair(4, 4), **options).resolve(shape)
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], splitting_ops=splitting_ops, use_inductor_graph_partition=False
    )
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", breakable)
    problems = checks.captured_stores(SimpleNamespace(compilation_config=compilation), resolved)
    assert len(problems) == (got is not None)
    assert all(
        "p: piecewise CUDA graphs must leave stores out" in line and f"but got {got}" in line for line in problems
    )


@pytest.mark.parametrize(
    ("tokens", "parallel_drafting", "dtype", "got"),
    [
        pytest.param(15, False, None, [], id="as many as the kernel takes"),
        pytest.param(16, False, "fp8", ["at most 15", "16"], id="one more"),
        pytest.param(7, True, "auto", [], id="and as many mask tokens"),
        pytest.param(8, True, None, ["at most 7", "8"], id="one more of each"),
        pytest.param(3, False, "kvtuner", ["one of vLLM's own", "kvtuner"], id="a quantized draft model"),
    ],
)
def test_speculation_that_is_refused(tokens, parallel_drafting, dtype, got):
    """The check is called itself: vLLM 0.32.0 knows no such dtype, and parallel drafting needs a model made for it."""
    speculative = SimpleNamespace(
        num_speculative_tokens=tokens, parallel_drafting=parallel_drafting, kv_cache_dtype=dtype
    )
    config = SimpleNamespace(speculative_config=speculative, use_v2_model_runner=False)
    problems = checks.speculation(config)
    assert len(problems) == bool(got)
    for part in got:
        assert part in problems[0]


@pytest.mark.parametrize(
    ("connector", "module", "extra", "got"),
    [
        ("OffloadingConnector", None, {"cpu_bytes_to_use": 1}, None),
        ("OffloadingConnector", None, {"blocks_per_chunk": 1}, None),
        ("OffloadingConnector", None, {"blocks_per_chunk": 2}, "OffloadingConnector and blocks_per_chunk=2"),
        ("OffloadingConnector", None, {"block_size": 64}, "OffloadingConnector and a block_size of its own"),
        ("OffloadingConnector", "of.others", {}, "OffloadingConnector"),
        ("NixlConnector", None, {}, None),
        ("NixlPullConnector", None, {}, None),
        ("NixlPushConnector", None, {}, "NixlPushConnector"),
        ("NixlConnector", "of.others", {}, "NixlConnector"),
        ("MultiConnector", None, {}, "MultiConnector"),
    ],
)
def test_sink_tokens_are_refused_where_a_connector_loses_them(connector, module, extra, got, monkeypatch):
    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)
    resolved = Profile("p", None, PrecisionPair(4, 4), recent_window=64, sink_tokens=4).resolve(shape)
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_module_path=module, kv_connector_extra_config=extra)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False), kv_transfer_config=transfer
    )
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    problems = checks.recent_windows(config, resolved)
    assert [problem.partition("but got 4 with ")[2] for problem in problems] == ([] if got is None else [got])


@pytest.mark.parametrize(
    ("connector", "module", "ranks", "is_refused"),
    [
        ("ExampleConnector", None, 1, False),
        ("ExampleConnector", None, 2, True),
        ("ExampleConnector", "of.others", 2, False),
        ("OffloadingConnector", None, 2, False),
        (None, None, 2, False),
    ],
)
def test_ranks_do_not_share_the_files_of_the_example(connector, module, ranks, is_refused):
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_module_path=module) if connector else None
    parallel = SimpleNamespace(tensor_parallel_size=ranks)
    problems = checks.files_of_ranks(SimpleNamespace(kv_transfer_config=transfer, parallel_config=parallel))
    rule = "tensor_parallel_size must be 1 with ExampleConnector, whose ranks write to the same files, but got 2"
    assert problems == ((rule,) if is_refused else ())


@pytest.mark.parametrize(
    ("profile", "model", "said"),
    [
        ({}, {}, []),
        ({"recent_window": 64}, {}, ["p: recent_window must be 0", "64"]),
        ({"transforms": TransformSettings(key_offset=True)}, {}, ["p: key_offset must be false", "layers 0-3"]),
        ({"transforms": TransformSettings(key_offset="from_weights")}, {}, []),  # once there are weights
        ({"attend_cached_prefill": True}, {}, ["p: attend_cached_prefill must be false", "true"]),
        ({}, {"speculative": "ngram"}, ["speculative_config must be left out", "ngram"]),
        ({}, {"layer_types": ["full_attention", "sliding_attention"] * 2}, ["toy: all layers must attend to all"]),
        ({}, {"is_hybrid": True}, ["toy: all layers must attend to all"]),
        ({}, {"num_kv_shared_layers": 1}, ["toy: layers must attend causally to keys of their own"]),
        ({}, {"is_mm_prefix_lm": True}, ["toy: layers must attend causally to keys of their own"]),
    ],
)
def test_what_context_parallelism_does_not_serve(profile, model, said):
    def refused(size):
        text = {"num_hidden_layers": 4, **{name: model[name] for name in model if name.startswith(("layer", "num"))}}
        kinds = {"is_hybrid": False, "is_mm_prefix_lm": False}
        kinds |= {name: model[name] for name in model if name in kinds}
        speculative = model.get("speculative")
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(decode_context_parallel_size=size),
            speculative_config=speculative and SimpleNamespace(method=speculative),
            additional_config={},
            model_config=SimpleNamespace(model="toy", hf_text_config=SimpleNamespace(**text), **kinds),
        )
        shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(1, 64),) * 4)
        return checks.context_parallel(config, Profile("p", None, PrecisionPair(4, 4), **profile).resolve(shape))

    assert refused(1) == ()
    problems = refused(2)
    assert len(problems) == bool(said)
    assert all(part in problems[0] for part in said)
    assert all("with decode_context_parallel_size=2" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "changes", "block_size"),
    [
        ("layers: K4V4\nrecent_window: 64", {}, 32),
        ("layers: {0: K4V4, 1: K8V8}\nrecent_window_overrides: {1: 32}", {}, 32),
        ("layers: K4V4", {}, 128),
        ("layers: {0: K4V4, 1: K16V16}\nrecent_window: 64", {}, 128),
        ("layers: K4V4\nrecent_window: 64", {"given": True}, 128),
        ("layers: K4V4\nrecent_window: 64", {"hybrid": True}, 128),
        ("layers: K4V4\nrecent_window: 64", {"speculative": object()}, 128),
    ],
)
def test_blocks_beside_a_window_of_a_file_are_small_on_a_cpu(tmp_path, monkeypatch, text, changes, block_size):
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: True))
    path = tmp_path / "profile.yaml"
    path.write_text(f"version: 1\n{text}\n")
    config = SimpleNamespace(
        additional_config={"kvtuner_profile": str(path)},
        cache_config=SimpleNamespace(block_size=128, user_specified_block_size=changes.get("given", False)),
        model_config=SimpleNamespace(is_hybrid=changes.get("hybrid", False)),
        speculative_config=changes.get("speculative"),
    )
    checks.adapt(config)
    assert config.cache_config.block_size == block_size
