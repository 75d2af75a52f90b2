"""Who attends over a prompt's keys and values on a GPU: FlashAttention, or for heads too large for it Triton."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.flash_attention import flash_attention
from tests.helpers.paged_cache import starts_of
from vllm_kvtuner.attention import prefill
from vllm_kvtuner.attention.prefill import (
    Flash,
    GpuPrefill,
    PortableAttention,
    WorkspaceShape,
    attention_of_prompts,
)
from vllm_kvtuner.kernels.contract import AttentionShape, Span


@pytest.mark.parametrize(
    ("head_size", "version", "kind"),
    [
        *((128, 3, Flash), (256, 2, Flash), (256, 3, Flash), (512, 4, Flash)),
        *((512, 2, PortableAttention), (512, 3, PortableAttention), (512, None, PortableAttention)),
    ],
)
def test_flash_attention_up_to_what_its_version_takes(head_size, version, kind):
    assert type(attention_of_prompts(AttentionShape(4, 2, head_size, 1.0), version)) is kind


@pytest.mark.parametrize(
    ("sliding_window", "recent", "masks"),
    [
        (None, None, {(True, -1), (False, -1)}),
        (100, None, {(True, 99)}),
        (None, 24, {(True, -1), (False, -1), (True, 23)}),
        (100, 24, {(True, 99), (True, 75), (True, 23)}),
    ],
)
def test_every_mask_is_compiled_at_start(sliding_window, recent, masks, monkeypatch):
    """Of what plans ask for: whole requests, context, and a recent window beside a sliding one."""
    seen = set()
    monkeypatch.setattr(
        prefill, "flash_attention_in_triton", lambda _, given: seen.add((given["causal"], given["window_size"][0]))
    )
    shape = AttentionShape(4, 2, 512, 1.0)
    window = recent and SimpleNamespace(cache=SimpleNamespace(window=SimpleNamespace(tokens=recent)))
    layer = SimpleNamespace(shape=shape, span=Span(sliding_window))
    room = WorkspaceShape(8, torch.float16, torch.device("cpu"))
    GpuPrefill(layer, PortableAttention(shape), room, window).warm_up()
    assert seen == masks
    seen.clear()
    GpuPrefill(layer, Flash(1.0, 0.0, 3), room, window).warm_up()
    assert not seen, "compiled already"


def test_the_portable_one_takes_the_same_arguments(device):
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, heads, 512, device=device).half() for heads in (4, 2, 2))
    starts = starts_of([2, 3], device)
    arguments = {"q": query, "k": key, "v": value, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    arguments |= {"max_seqlen_q": 3, "max_seqlen_k": 3, "causal": True, "window_size": [1, 0]}
    got = PortableAttention(AttentionShape(4, 2, 512, 0.05, 2.0))(**arguments)
    arguments = {name: each.cpu() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    want = flash_attention(0.05, 2.0)(**arguments)
    torch.testing.assert_close(got.output.cpu(), want.output, rtol=0, atol=2e-3)
