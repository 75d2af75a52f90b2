"""Files of vLLM's ExampleConnector that were cut short, or find no room on the disk."""

import functools
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs

logger = logging.getLogger("vllm.kvtuner")
_LENGTH_BYTES = 8
"""At the head of a safetensors file, the length of the header that follows."""


def keep_whole_files(connector: Any) -> None:
    """Read a prompt's files only if each layer's is whole, and go on without those that cannot be written.

    Symptom: a file that was cut short, or a full disk, ends the engine, and all requests with it. Cause: a folder is
    taken for a hit whatever it holds, and errors of reading and writing are raised in the middle of a step. Can go when
    the connector does so itself.

    Args:
        connector: an ExampleConnector, of the scheduler or of a worker.
    """
    found, save = connector._found_match_for_prompt, connector.save_kv_layer
    sizes = _token_bytes(connector._kv_cache_config)
    # Not imported above: only a run with this connector needs its module.
    tokens_in_files = sys.modules[type(connector).__module__].align_to_block_size

    @functools.wraps(found)
    def found_match_for_prompt(prompt_token_ids: list[int], mm_hashes: list[str]) -> bool:
        if not found(prompt_token_ids, mm_hashes):
            return False
        tokens = tokens_in_files(len(prompt_token_ids), connector._block_size)
        token_ids = torch.tensor(prompt_token_ids)[:tokens]
        return all(
            _is_whole(Path(connector._generate_filename_debug(name, token_ids, mm_hashes)), tokens * size)
            for name, size in sizes.items()
        )

    @functools.wraps(save)
    def save_kv_layer(layer_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            save(layer_name, *args, **kwargs)
        except (OSError, SafetensorError) as error:
            logger.warning("kvtuner: %s is not stored for later prompts: %s", layer_name, error)

    connector._found_match_for_prompt = found_match_for_prompt
    connector.save_kv_layer = save_kv_layer


def _token_bytes(config: KVCacheConfig) -> dict[str, int]:
    """Bytes of a token in each layer's pages."""
    sizes = {}
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        specs = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else {}
        for name in group.layer_names:
            of_layer = specs.get(name, spec)
            sizes[name] = of_layer.page_size_bytes // of_layer.block_size
    return sizes


def _is_whole(file: Path, content_bytes: int) -> bool:
    try:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        return file.stat().st_size == _LENGTH_BYTES + header + content_bytes
    except OSError:
        return False
