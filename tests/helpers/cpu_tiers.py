"""vLLM's offloading to CPU memory and disk, for engines on a CPU: all of it is vLLM's but the copies, which it does on
GPUs alone. Named in kv_connector_extra_config, as specs out of its tree are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


def offloading(folder: Path, cpu_bytes: int = 64 << 20, **extra: Any) -> dict[str, Any]:
    """kv_transfer_config of an engine that offloads to so much memory, and to files in a folder."""
    tiers = [{"type": "fs", "root_dir": str(folder), "n_read_threads": 1, "n_write_threads": 1}]
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTiers",
            "spec_module_path": __name__,
            "cpu_bytes_to_use": cpu_bytes,
            "secondary_tiers": tiers,
            "offload_prompt_only": False,
            **extra,
        },
    }


class CpuTiers(TieringOffloadingSpec):
    """Tiers of an engine on a CPU; one block per chunk."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyingWorker(kv_caches, region)


class CopyingWorker(OffloadingWorker):
    """Copies pages when it is asked to.

    Args:
        kv_caches: of the engine.
        region: memory that stands for that beside a GPU.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._refs = kv_caches.group_data_refs
        self._pages = [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in kv_caches.tensors]
        self._chunks = [region.create_next_worker_view(each.page_size_bytes) for each in kv_caches.tensors]
        self._region = region
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, self._pages, src_spec.block_ids, self._chunks, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, self._chunks, src_spec.block_ids, self._pages, dst_spec.block_ids)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pages.clear()
        self._chunks.clear()
        self._region.cleanup()

    def _copy(
        self,
        job_id: int,
        spec: GPULoadStoreSpec,
        sources: list[torch.Tensor],
        source_ids: Sequence[int],
        targets: list[torch.Tensor],
        target_ids: Sequence[int],
    ) -> bool:
        first = copied = 0
        for refs, count in zip(self._refs, spec.group_sizes, strict=True):
            rows = slice(first, first + count)
            for ref in refs:
                size = ref.page_size_bytes
                taken = sources[ref.tensor_idx][source_ids[rows].tolist(), :size]
                targets[ref.tensor_idx][target_ids[rows].tolist(), :size] = taken
                copied += taken.nbytes
            first += count
        self._done.append(TransferResult(job_id, True, copied, 0.001))
        return True
