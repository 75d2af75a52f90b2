"""Decode context parallelism."""

from vllm_kvtuner.compat.inspection import Seam

SEAMS = (
    Seam(
        "what a rank stores of a request", "vllm.v1.attention.backends.utils:get_dcp_local_seq_lens",
        "attention.context_parallel.ContextShards",
        ("seq_lens", "dcp_size", "dcp_rank", "cp_kv_cache_interleave_size"), exact=True,
    ),
    Seam(
        "parts of attention become one", "vllm.v1.attention.ops.dcp:cp_lse_ag_out_rs",
        "attention.context_parallel.ContextShards", ("cp_attn_out", "cp_attn_lse", "cp_group", "return_lse"),
    ),
    Seam(
        "the same by other messages", "vllm.v1.attention.ops.dcp:dcp_a2a_lse_reduce",
        "attention.context_parallel.ContextShards", ("cp_attn_out", "cp_attn_lse", "cp_group", "return_lse"),
    ),
    Seam(
        "ranks of an implementation", "vllm.v1.attention.backend:AttentionImplBase", "attention.impl.KVTunerImpl",
        attributes=("dcp_world_size", "can_return_lse_for_decode", "supports_dcp"),
    ),
    Seam(
        "a batch's lengths on a rank", "vllm.v1.attention.backend:CommonAttentionMetadata",
        "attention.backend.KVTunerMetadataBuilder", attributes=("dcp_local_seq_lens",),
    ),
)  # fmt: skip
