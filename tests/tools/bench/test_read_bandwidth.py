"""The plain kernel that bandwidth is measured with."""

import pytest
import torch

from kvtuner_tools.bench.points import LayerHeads
from kvtuner_tools.bench.read_bandwidth import BYTES, CONFIGS, STEPS, read_sums

HEADS = LayerHeads(4, 2, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_the_read_kernel_reads_everything(device):
    source = torch.randint(0, 100, (1 << 15,), dtype=torch.int32, device=device)
    sums = read_sums(source, block=2048, num_warps=4)
    assert torch.equal(sums, source.view(-1, 2048 * STEPS).sum(1, dtype=torch.int32))
    assert all(BYTES % (4 * STEPS * block) == 0 for block, _ in CONFIGS)
