"""The blocks that hold the newest tokens of each request, found by one launch where torch would take ten."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride", "max_blocks"])
def _newest_blocks_kernel(
    block_table_ptr, seq_lens_ptr, query_start_loc_ptr, table_ptr, lens_ptr, table_stride, max_blocks,
    WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    seq_len = tl.load(seq_lens_ptr + request)
    num_queries = tl.load(query_start_loc_ptr + request + 1) - tl.load(query_start_loc_ptr + request)
    first = tl.maximum(seq_len - num_queries - (WINDOW - 1), 0) // BLOCK_SIZE
    column = tl.arange(0, PADDED)
    wanted = column < COLUMNS
    entry = block_table_ptr + request.to(tl.int64) * table_stride + tl.minimum(first + column, max_blocks - 1)
    tl.store(table_ptr + request * COLUMNS + column, tl.load(entry, mask=wanted, other=0), mask=wanted)
    tl.store(lens_ptr + request, seq_len - first * BLOCK_SIZE)


def newest_blocks(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    window: int,
    block_size: int,
    table: torch.Tensor,
    lens: torch.Tensor,
) -> None:
    """As :func:`vllm_kvtuner.reference.newest_blocks_ref`; ``table`` and ``lens`` contiguous."""
    num_reqs, columns = table.shape
    assert table.is_contiguous() and lens.is_contiguous() and lens.shape == seq_lens.shape == (num_reqs,)
    for numbers in (block_table, seq_lens, query_start_loc, table, lens):
        assert numbers.dtype == torch.int32 and numbers.stride(-1) == 1
    _newest_blocks_kernel[(num_reqs,)](
        block_table, seq_lens, query_start_loc, table, lens, block_table.stride(0), block_table.shape[1],
        WINDOW=window, BLOCK_SIZE=block_size, COLUMNS=columns, PADDED=triton.next_power_of_2(columns), num_warps=1,
    )  # fmt: skip
