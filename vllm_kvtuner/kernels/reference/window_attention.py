"""Attention over what a recent window holds, in torch."""

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Pages, Queries, Segment, Span
from vllm_kvtuner.kernels.reference.attention import attention_ref, merge_segments_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref, gather_rows_ref


def window_attention_ref(
    query: torch.Tensor,
    queries: Queries,
    rows: torch.Tensor | Pages,
    shape: AttentionShape,
    span: Span,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.WindowAttention`, queries of any length; ``rows`` may be packed
    pages, as a window of 8 bits keeps them."""
    starts, lens = queries.query_start_loc.long(), queries.seq_lens.long()
    begins = (lens - starts.diff() - span.skip_newest + 1).clamp(min=0)
    heads = begins.clamp(max=span.skip_first)
    # Of each request its sink tokens before the window, and those of the window. Padding holds none.
    lengths = torch.stack([heads, (lens - begins).clamp(min=0)], 1)
    ends = torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
    firsts = torch.stack([torch.zeros_like(begins), begins], 1).flatten()
    held = CachedTokens(queries.block_table.repeat_interleave(2, 0), ends, firsts, int(ends[-1]))
    keys, values = (
        torch.empty(held.num_tokens, shape.num_kv_heads, shape.head_size, device=query.device) for _ in range(2)
    )
    read_window_ref(rows, held, keys, values)
    bounds, asked = ends[::2].tolist(), starts.tolist()
    for index, (length, begin, head) in enumerate(zip(lens.tolist(), begins.tolist(), heads.tolist(), strict=True)):
        cached, fresh = slice(bounds[index], bounds[index + 1]), slice(asked[index], asked[index + 1])
        if cached.start == cached.stop or fresh.start == fresh.stop:
            continue
        token = torch.cat([torch.arange(head), torch.arange(begin, length)]).to(query.device)
        distance = torch.arange(length - (fresh.stop - fresh.start), length, device=query.device)[:, None] - token
        visible = (distance >= 0) & ((distance < span.skip_newest) | (token < span.skip_first))
        if span.sliding_window is not None:
            visible &= distance < span.sliding_window
        newest = Segment.into(torch.empty_like(query[fresh], dtype=torch.float32))
        attention_ref(query[fresh], keys[cached], values[cached], shape, visible, newest.output, newest.lse)
        merge_segments_ref(Segment(output[fresh], lse[:, fresh]), newest, output[fresh])


def read_window_ref(
    rows: torch.Tensor | Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor
) -> None:
    """Gather from a window of 16 bits, which keeps rows as they are, or of 8 bits, which packs them."""
    if isinstance(rows, Pages):
        gather_cache_ref(rows, tokens, key_out, value_out)
    else:
        gather_rows_ref(rows, tokens, key_out, value_out)
