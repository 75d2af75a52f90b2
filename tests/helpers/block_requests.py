"""Requests against vLLM's own KVCacheManager, as its scheduler looks prompts up and allocates for them."""

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from vllm_kvtuner.blocks.allocation import methods_where_needed


def make_request(name, tokens, block_size):
    """``block_size``: tokens that the prefix cache hashes at once."""
    sampling = SamplingParams(max_tokens=4096)
    return Request(name, list(tokens), sampling, None, block_hasher=get_request_block_hasher(block_size, sha256))


def start(manager, request):
    """Look the prompt up; returns hit blocks and tokens."""
    blocks, hit, request.shared_prefix_boundary = manager.get_computed_blocks(request)
    return blocks, hit


def prefill(manager, request, chunk):
    """Compute a prompt, chunk by chunk; returns the tokens that were found."""
    blocks, hit = start(manager, request)
    done = hit
    while done < request.num_prompt_tokens:
        tokens = min(chunk, request.num_prompt_tokens - done)
        found = {"num_new_computed_tokens": hit, "new_computed_blocks": blocks} if done == hit else {}
        assert manager.allocate_slots(request, tokens, **found) is not None
        request.num_computed_tokens = done = done + tokens
    return hit


def allocate_where_needed(manager):
    """Install what makes steps skip needless allocations, as compat does for a scheduler's manager."""
    for name, method in methods_where_needed(manager).items():
        setattr(manager, name, method)
