"""How workers' word of their kernels reaches the process that answers ``/metrics``."""

from types import SimpleNamespace

import msgspec
import pytest
from vllm.v1.engine import EngineCoreReadyResponse
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient

from tests.compat.test_worker import Told, worker_with
from vllm_kvtuner.compat import reporting
from vllm_kvtuner.compat.worker import decode_kernels
from vllm_kvtuner.engine.metrics import kept_decode_kernels

ENGINE = 3
READY = {
    "max_model_len": 100, "num_gpu_blocks": 5, "block_size": 16, "dp_stats_address": None, "dtype": "bfloat16",
    "vllm_version": "0", "world_size": 1, "data_parallel_size": 4, "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "data_parallel_rank": ENGINE, "max_num_seqs": 8,
    "max_num_batched_tokens": 64, "instance_id": "a", "supports_lora": False, "max_loras": 0,
}  # fmt: skip


def serving(kernel, dtype="kvtuner", index=7):
    """A worker with one layer that such a kernel decodes."""
    impl = Told()
    impl.settings = SimpleNamespace(precision=SimpleNamespace(index=index))
    impl.served = SimpleNamespace(kernels=SimpleNamespace(decode_kernel=kernel))
    return worker_with(impl, dtype)


def test_a_worker_names_the_kernels_of_its_layers():
    assert decode_kernels(serving("triton")) == {7: "triton"}
    assert decode_kernels(serving(None)) == {}, "none has been chosen"
    assert decode_kernels(serving("triton", dtype="auto")) == {}


@pytest.fixture
def start(monkeypatch):
    """What a front end knows of an engine core with these workers, each end in a process of its own."""
    monkeypatch.setattr(EngineCore, "_initialize_kv_caches", lambda self, vllm_config: "configuration")
    monkeypatch.setattr(EngineCoreProc, "_make_ready_response", lambda self: EngineCoreReadyResponse(**READY))
    applied = []
    monkeypatch.setattr(MPClient, "_apply_ready_response", lambda self, payload: applied.append(payload))
    reporting.tell_front_end_of_kernels()

    def start(*workers, dtype="kvtuner"):
        def configuration():
            return SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=dtype))

        core = EngineCoreProc.__new__(EngineCoreProc)
        core.engine_index, core.vllm_config = ENGINE, configuration()
        ask = SimpleNamespace(collective_rpc=lambda method: [method(worker) for worker in workers])
        core.model_executor = ask if dtype == "kvtuner" else None
        assert core._initialize_kv_caches(core.vllm_config) == "configuration"
        payload = msgspec.msgpack.encode(core._make_ready_response())
        assert msgspec.msgpack.decode(payload, type=EngineCoreReadyResponse) == EngineCoreReadyResponse(**READY)
        client = SimpleNamespace(vllm_config=configuration())
        for each in (payload, b""):  # an engine that was there before may send nothing
            MPClient._apply_ready_response(client, each)
        assert applied == [payload, b""]
        return kept_decode_kernels(client.vllm_config, ENGINE), payload

    return start


def test_the_front_end_hears_of_the_kernels_that_serve(start):
    kernels, _ = start(serving("cuda"), serving("triton"), serving("cuda", index=8))
    assert kernels == {7: "triton", 8: "cuda"}


def test_engines_with_another_cache_say_what_vllm_does(start):
    kernels, payload = start(dtype="auto")
    assert kernels == {} and payload == msgspec.msgpack.encode(EngineCoreReadyResponse(**READY))
