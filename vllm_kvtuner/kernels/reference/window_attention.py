"""Attention over what a recent window holds, in torch."""

from collections.abc import Callable

import torch

from vllm_kvtuner.kernels.reference.attention import attention_ref, merge_segments_ref
from vllm_kvtuner.kernels.reference.rows import gather_rows_ref


def recent_attention_ref(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    recent: int,
    sinks: int,
    output: torch.Tensor,
    lse: torch.Tensor,
    sliding_window: int | None = None,
    logits_soft_cap: float = 0.0,
    *,
    gather: Callable[..., None] = gather_rows_ref,
) -> None:
    """Attention of decodes over what a recent window holds, merged into that over all other tokens, in place.

    A query sees its newest ``recent`` tokens, itself the first, and the ``sinks`` first of its request, as far as its
    sliding window reaches.

    Args:
        query: [num_tokens, num_heads, head_size].
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], each key beside its value.
        block_table: [num_reqs, max_blocks] int32, of the window; only blocks of tokens that some query sees are read.
        seq_lens: [num_reqs] int32, tokens in the cache, the queries' included; 0 for padding.
        query_start_loc: [num_reqs + 1] int32.
        max_query_len: the longest query; no limit.
        scale: factor on the logits.
        recent: tokens of the window.
        sinks: tokens at a request's head.
        output: [num_tokens, num_heads, head_size], on entry attention over the tokens that the window leaves out.
        lse: [num_heads, num_tokens] fp32, log-sum-exp of that; -inf where there are none.
        sliding_window: tokens a query sees at all, itself included, or None.
        logits_soft_cap: as :func:`vllm_kvtuner.kernels.reference.attention.paged_attention_ref`.
        gather: what reads the cache, as :func:`vllm_kvtuner.kernels.reference.rows.gather_rows_ref`.
    """
    starts, lens = query_start_loc.long(), seq_lens.long()
    begins = (lens - starts.diff() - recent + 1).clamp(min=0)
    heads = begins.clamp(max=sinks)
    # Of each request its sink tokens before the window, and those of the window. Padding holds none.
    lengths = torch.stack([heads, (lens - begins).clamp(min=0)], 1)
    ends = torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
    firsts = torch.stack([torch.zeros_like(begins), begins], 1).flatten()
    num_tokens, num_kv_heads = int(ends[-1]), kv_cache.shape[1]
    keys, values = (torch.empty(num_tokens, num_kv_heads, query.shape[2], device=query.device) for _ in range(2))
    gather(kv_cache, block_table.repeat_interleave(2, 0), ends, firsts, keys, values, num_tokens=num_tokens)
    bounds, queries = ends[::2].tolist(), starts.tolist()
    for index, (length, begin, head) in enumerate(zip(lens.tolist(), begins.tolist(), heads.tolist(), strict=True)):
        held, asked = slice(*bounds[index : index + 2]), slice(*queries[index : index + 2])
        if held.start == held.stop or asked.start == asked.stop:
            continue
        token = torch.cat([torch.arange(head), torch.arange(begin, length)]).to(query.device)
        distance = torch.arange(length - (asked.stop - asked.start), length, device=query.device)[:, None] - token
        visible = (distance >= 0) & ((distance < recent) | (token < sinks))
        if sliding_window is not None:
            visible &= distance < sliding_window
        attended = torch.empty_like(query[asked], dtype=torch.float32)
        sums = torch.empty_like(lse[:, asked])
        rows = (query[asked], keys[held], values[held], scale)
        attention_ref(*rows, attended, None, logits_soft_cap, lse=sums, visible=visible)
        merge_segments_ref((output[asked], attended), (lse[:, asked], sums), output[asked])
