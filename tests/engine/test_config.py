"""The plugin's parts that need no engine."""

import inspect
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from vllm_kvtuner import compat
from vllm_kvtuner.engine import checks
from vllm_kvtuner.engine.config import PROFILE_KEY
from vllm_kvtuner.engine.statics import _heads_of_rank, layer_rotary, rotary_table
from vllm_kvtuner.kernels import choice
from vllm_kvtuner.kernels import layer as layer_module
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.plugin import register
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.profile import Profile


@pytest.mark.parametrize(
    ("total", "local", "world_size", "expected"),
    [
        pytest.param(8, 8, 1, [(0, 8)], id="one rank"),
        pytest.param(8, 2, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], id="two heads a rank"),
        pytest.param(2, 1, 4, [(0, 1), (0, 1), (1, 2), (1, 2)], id="each head on two ranks"),
    ],
)
def test_a_rank_takes_the_statics_of_its_own_heads(total, local, world_size, expected):
    slices = [_heads_of_rank(total, local, rank, world_size) for rank in range(world_size)]
    assert [(part.start, part.stop) for part in slices] == expected
    assert all(np.arange(total)[part].size == local for part in slices)


class _Rotary(torch.nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)


class _Config:
    class model_config:
        dtype = torch.bfloat16

        class hf_text_config:
            rope_parameters: ClassVar = {"rope_type": "default"}


def test_the_rotary_table_is_the_models_own():
    table = torch.randn(32, 16)
    rotary = rotary_table(_Rotary(cos_sin_cache=table, is_neox_style=False), _Config, 0)
    assert torch.equal(rotary.cos_sin, table.bfloat16())
    assert not rotary.is_neox


@pytest.mark.parametrize(("use_long", "rows"), [(False, slice(0, 8)), (True, slice(8, 32))])
def test_phi3_takes_the_table_of_the_context_in_use(use_long, rows):
    table = torch.randn(32, 16)
    module = _Rotary(long_short_cos_sin_cache=table, original_max_position_embeddings=8, use_long_rope=use_long)
    assert torch.equal(rotary_table(module, _Config, 0).cos_sin, table[rows].bfloat16())


def test_a_layer_without_rope_has_no_table():
    assert rotary_table(None, _Config, 0) is None


def test_a_rotary_embedding_kept_elsewhere_is_not_taken_for_none():
    assert layer_rotary(_Rotary(rotary_emb=None), _Config, 0) is None
    with pytest.raises(ValueError, match="layer 3: key_offset needs the rotary embedding beside the attention layer"):
        layer_rotary(_Rotary(), _Config, 3)


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({"cos_sin_cache": torch.zeros(4, 8), "mrope_section": [1, 1, 2]}, id="M-RoPE"),
        pytest.param({}, id="no table"),
        pytest.param({"cos_sin_cache": torch.zeros(4, 4, dtype=torch.complex64)}, id="complex table"),
    ],
)
def test_rotary_embeddings_without_one_row_per_position_are_refused(attributes):
    with pytest.raises(ValueError, match="layer 3: key_offset needs"):
        rotary_table(_Rotary(**attributes), _Config, 3)


def test_backends_are_one_class_per_pair():
    from vllm_kvtuner.attention.backend import backend_for

    pairs = [PrecisionPair(8, 4), PrecisionPair(4, 2)]
    classes = [backend_for(pair) for pair in pairs]
    assert [cls.pair for cls in classes] == pairs
    assert backend_for(PrecisionPair(8, 4)) is classes[0]
    assert len({cls.full_cls_name() for cls in classes}) == 2


def test_the_profile_stays_in_the_arguments_that_other_processes_read():
    """A process that unpickles them makes the engine's arguments before vLLM loads plugins there."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--kvtuner-profile", "K8V4", "--additional-config", '{"other": 1}']
    args = parser.parse_args(["--model", "m", "--kv-cache-dtype", "kvtuner", *given])
    expected = {"other": 1, PROFILE_KEY: "K8V4"}
    assert EngineArgs.from_cli_args(args).additional_config == expected
    without_plugin = EngineArgs.from_cli_args.__func__.__wrapped__
    assert without_plugin(EngineArgs, args).additional_config == expected


@pytest.mark.parametrize(
    ("is_cpu", "attend", "bits", "refused"),
    [(False, True, 8, True), (True, True, 8, False), (False, False, 8, False), (False, True, 16, False)],
)
def test_8_bit_windows_are_refused_where_a_gpu_does_not_read_them_back(is_cpu, attend, bits, refused, monkeypatch):
    """The check is called itself: with vLLM's CPU build no engine has a GPU."""
    from vllm import platforms

    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)
    options = {"recent_window": 64, "recent_window_bits": bits, "attend_cached_prefill": attend}
    resolved = Profile("p", None, PrecisionPair(4, 4), **options).resolve(shape)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False))
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: is_cpu))
    problems = checks.recent_windows(config, resolved)
    assert [line.rpartition(", but got ")[2] for line in problems] == (["8"] if refused else [])


@pytest.mark.parametrize(("is_cpu", "bits"), [(False, 16), (False, 8), (True, 8)])
def test_sink_tokens_of_8_bits_are_refused_on_a_gpu(is_cpu, bits, monkeypatch):
    from vllm import platforms

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


def test_waking_up_zeroes_the_counters_of_the_decode_kernel(monkeypatch):
    """Called itself: only a GPU's worker sleeps. Memory of a tag that still sleeps is not touched."""
    from vllm.v1.worker.gpu_worker import Worker

    scratch = SimpleNamespace(arrivals=torch.zeros(3, dtype=torch.int32))
    monkeypatch.setattr(choice, "decode_kernel", lambda *_: choice.CUDA)
    monkeypatch.setattr(layer_module, "_cuda_workspace", lambda *_: scratch)
    kernels = layer_module.LayerKernels(4, 2, 64, 0.125, None, 0.0, 8, 1, torch.device("cpu"))
    kernels.reserve(PrecisionPair(4, 4), LayerTransforms(), False)
    kernels.forget()
    window = SimpleNamespace(wake_up=lambda: woken.append(1))
    woken: list[int] = []
    layer = SimpleNamespace(impl=SimpleNamespace(kernels=kernels, recent_kernels=SimpleNamespace(kernels=window)))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="kvtuner"),
        compilation_config=SimpleNamespace(static_forward_context={"a": layer, "b": SimpleNamespace()}),
    )
    worker = SimpleNamespace(vllm_config=config)
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags=None: None)
    compat.wake_kernels_up()
    for tags, expected in ((["kv_cache"], 1), (["weights"], 0), (None, 0)):
        scratch.arrivals.fill_(1)
        Worker.wake_up(worker, tags)
        assert scratch.arrivals.tolist() == [expected] * 3
    assert len(woken) == 2


def test_connectors_keep_profiles_apart(monkeypatch):
    """What an offloading connector files pages under, and what two ends of a transfer compare."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector
    from vllm.v1.kv_offload.config import OffloadingModelConfig

    @dataclass(frozen=True)
    class Built:
        model: OffloadingModelConfig

    nixl = SimpleNamespace(compute_nixl_compatibility_hash=lambda config, backend, transfer_mode: "hash")
    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker", nixl)
    built = Built(OffloadingModelConfig("model", "kvtuner"))
    monkeypatch.setattr(offloading_connector, "build_offloading_config", lambda config, caches: built)
    # Without the seam that other tests of this process may have installed.
    original = inspect.unwrap(KVConnectorFactory.get_connector_class)
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", original)
    compat.tell_connectors_of_the_profile()
    asked = SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_module_path=None)
    for _ in range(2):  # as the scheduler does, and the worker
        KVConnectorFactory.get_connector_class(asked)

    def config(dtype, digest):
        cache = SimpleNamespace(cache_dtype=dtype)
        return SimpleNamespace(cache_config=cache, additional_config={"kvtuner_digest": digest})

    def offloaded(*which):
        return offloading_connector.build_offloading_config(config(*which), None).model

    def handshake(*which):
        return nixl.compute_nixl_compatibility_hash(config(*which), "CUSTOM", transfer_mode="pull")

    assert offloaded("auto", "a") is built.model
    assert offloaded("kvtuner", "a") == OffloadingModelConfig("model", "kvtuner-a")
    assert handshake("auto", "a") == "hash"
    assert len({handshake("auto", "a"), handshake("kvtuner", "a"), handshake("kvtuner", "b")}) == 3
    assert handshake("kvtuner", "a") == handshake("kvtuner", "a")
