"""Verification of drafted tokens, as vLLM's model runner V2 captures and replays it: the decode kernel, in full graphs.

No graph is captured here: vLLM's own choice of graphs is asked, and the metadata that one would be captured with built.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu import cudagraph_utils

from kvtuner_tools.bench.points import Point
from kvtuner_tools.bench.speculation import Speculation
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.serve import ServeJob
from tests.attention.test_metadata_builder import build
from vllm_kvtuner.attention.backend import KVTunerMetadataBuilder

DRAFTED = 3
QUERY_LEN = 1 + DRAFTED


@pytest.fixture
def manager(monkeypatch, tmp_path):
    """vLLM's choice of graphs for an engine of ``bench serve`` with this backend; as if they were captured."""
    job = ServeJob(
        model=tmp_path, vocab_size=1, setting=CacheSetting("kvtuner", "K4V4"), points=(Point(64, 8192),),
        output_tokens=64, throughput=(), window_s=1.0, long_prefill=None, memory=0.85, kv_memory_bytes=None,
        max_model_len=33000, max_num_seqs=256, lines=tmp_path, speculation=Speculation(DRAFTED, 0.7),
    )  # fmt: skip
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
    monkeypatch.setattr(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False)
    sizes = job.capture_sizes
    compilation = CompilationConfig(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=sizes,
        max_cudagraph_capture_size=max(sizes),
    )  # fmt: skip
    support = KVTunerMetadataBuilder.get_cudagraph_support(SimpleNamespace(), SimpleNamespace())
    assert support == AttentionCGSupport.UNIFORM_BATCH
    compilation.set_splitting_ops_for_v1("", 1)
    mode = compilation.resolve_cudagraph_mode_and_sizes(support, "kvtuner", QUERY_LEN, use_v2_model_runner=True)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=job.max_num_seqs), compilation_config=compilation,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1), speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )  # fmt: skip
    manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), mode, decode_query_len=QUERY_LEN)
    manager._graphs_captured = True
    return manager


@pytest.mark.parametrize("requests", [1, 8, 64, 256])
def test_batches_that_verify_are_full_graphs(manager, requests):
    graph = manager.dispatch(requests, requests * QUERY_LEN, QUERY_LEN, 0, max_query_len=QUERY_LEN)

    assert graph.cg_mode == CUDAGraphMode.FULL
    assert (graph.num_reqs, graph.num_tokens) == (requests, requests * QUERY_LEN), "nothing is padded"


def test_batches_of_several_lengths_are_not(manager):
    assert manager.dispatch(64, 250, None, 0).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(64, 64, 1, 0, max_query_len=1).cg_mode == CUDAGraphMode.PIECEWISE


def test_graphs_hold_the_decode_kernel():
    """At capture a request has no context, and at replay any."""
    for context in (0, 8192):
        metadata = build(requests=[(context, QUERY_LEN)] * 8, speculative=DRAFTED)
        assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.prefill) == (8, 8 * QUERY_LEN, None)
        assert metadata.max_decode_query_len == QUERY_LEN
