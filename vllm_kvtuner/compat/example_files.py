"""Files of vLLM's ExampleConnector that were cut short, or find no room on the disk."""

import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

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
    layers = [name for group in connector._kv_cache_config.kv_cache_groups for name in group.layer_names]
    # Not imported above: only a run with this connector needs its module.
    tokens_in_files = sys.modules[type(connector).__module__].align_to_block_size

    @functools.wraps(found)
    def found_match_for_prompt(prompt_token_ids: list[int], mm_hashes: list[str]) -> bool:
        if not found(prompt_token_ids, mm_hashes):
            return False
        tokens = tokens_in_files(len(prompt_token_ids), connector._block_size)
        token_ids = torch.tensor(prompt_token_ids)[:tokens]
        files = (Path(connector._generate_filename_debug(name, token_ids, mm_hashes)) for name in layers)
        return all(_is_whole(file, tokens) for file in files)

    @functools.wraps(save)
    def save_kv_layer(layer_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            save(layer_name, *args, **kwargs)
        except (OSError, SafetensorError) as error:
            logger.warning("kvtuner: %s is not stored for later prompts: %s", layer_name, error)

    connector._found_match_for_prompt = found_match_for_prompt
    connector.save_kv_layer = save_kv_layer


def _is_whole(file: Path, tokens: int) -> bool:
    """Whether a file is there, of so many tokens, and as long as its own header says."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            size = file.stat().st_size
            tensor = json.loads(opened.read(min(length, size)))["kv_cache"]
        end = _LENGTH_BYTES + length + tensor["data_offsets"][1]
        return bool(tensor["shape"][0] == tokens and size == end)
    except (OSError, ValueError, LookupError, TypeError):
        return False
