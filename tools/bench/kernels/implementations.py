"""Every implementation that can be measured, by its name in arguments, results and pictures."""

from kvtuner_tools.bench.kernels import flashinfer, packed, vllm
from kvtuner_tools.bench.kernels.base import DecodeKernel, GatherKernel, StoreKernel

DECODE: dict[str, DecodeKernel] = {
    "fa3_bf16": vllm.FlashAttention3(fp8=False),
    "fa3_fp8": vllm.FlashAttention3(fp8=True),
    "xqa_bf16": flashinfer.Xqa(fp8=False),
    "xqa_fp8": flashinfer.Xqa(fp8=True),
    "int4_per_token_head": vllm.Int4PerTokenHead(),
    "triton": packed.TritonKernel(),
    "cuda": packed.CudaKernel(),
}
"""Of ``points.IMPLEMENTATIONS``, which arguments name without importing torch."""
STORE: dict[str, StoreKernel] = {
    "reshape_and_cache_flash auto": vllm.ReshapeAndCacheFlash("auto"),
    "reshape_and_cache_flash fp8": vllm.ReshapeAndCacheFlash("fp8"),
    "triton": packed.PackedStore(packed.TRITON),
    "cuda": packed.PackedStore(packed.CUDA),
}
GATHER: dict[str, GatherKernel] = {
    "triton": packed.PackedGather(packed.TRITON),
    "cuda": packed.PackedGather(packed.CUDA),
}
