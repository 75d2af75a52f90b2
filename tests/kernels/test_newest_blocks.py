"""newest_blocks against the reference, and the reference against what a window is."""

import pytest
import torch

from vllm_kvtuner.kernels.newest_blocks import newest_blocks
from vllm_kvtuner.layout import recent_blocks
from vllm_kvtuner.reference import newest_blocks_ref


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [1, 16, 70])
def test_the_window_of_every_query_is_there_and_no_block_before_it(window, block_size, device):
    queries = torch.tensor([1, 3, 1, 2, 0, 1, 3], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([1, 16, 97, 960, 0, 700, 3], dtype=torch.int32, device=device)
    starts = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()
    block_table = torch.randint(1, 1000, (7, 960 // block_size), dtype=torch.int32, device=device)
    columns = recent_blocks(window, block_size, 3)
    results = []
    for function in (newest_blocks_ref, newest_blocks):
        table, lens = torch.full((7, columns), -1, dtype=torch.int32, device=device), torch.full_like(seq_lens, -1)
        function(block_table, seq_lens, starts, window, block_size, table, lens)
        results.append((table, lens))
    (table, lens), got = results
    assert torch.equal(got[0], table) and torch.equal(got[1], lens)
    for request, (length, count) in enumerate(zip(seq_lens.tolist(), queries.tolist(), strict=True)):
        begin = max(0, length - count - window + 1) // block_size
        assert lens[request] == length - begin * block_size <= columns * block_size
        blocks = -(-length // block_size) - begin
        assert torch.equal(table[request, :blocks], block_table[request, begin : begin + blocks])
