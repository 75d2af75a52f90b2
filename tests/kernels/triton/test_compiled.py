"""What the compiled kernels take of cards that are not here."""

import pytest

from tests.helpers.triton_cubin import compile_kernels

SHARED_BYTES_OF_A_CTA = 99 << 10
"""On compute capability 8.6, 8.9, 12.0 and 12.1, which have the least."""


@pytest.mark.slow
def test_kernels_of_large_heads_fit_any_card_without_warp_group_products():
    """All transforms and 8-bit codes take the most; window_attention.py says what is wrong with such products."""
    kernels = ["gather_cache", "attend", "window_attention", "prompt_attention"]
    names = [f"_{name}_kernel" for name in kernels]
    compiled = compile_kernels("sm_90", 512, "K8V8", names)
    assert {each.kernel for each in compiled} == set(names)
    for each in compiled:
        print(each)
        assert each.shared_bytes <= SHARED_BYTES_OF_A_CTA
        assert not each.warp_group_products
