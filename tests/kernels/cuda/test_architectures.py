"""The CUDA sources through the compiler for every architecture that may serve, most of which nobody here has run.

A few variants of each kernel per architecture; tests of the single kernels compile many for the one that was run.
"""

import re

import pytest
import torch

from tests.helpers.cubin import instructions, resource_usage
from tests.helpers.markdown import DOCS
from tests.helpers.paged_cache import make_layout, random_transforms, rotary_table
from tests.kernels.cuda.test_build import SHARED_BYTES, SHARED_BYTES_OF_A_CTA, Variant
from vllm_kvtuner.kernels.cuda import gather_cache, reshape_and_cache
from vllm_kvtuner.kernels.cuda.build import compile_cubin
from vllm_kvtuner.kernels.cuda.rows import NUM_WARPS, RowVariant, StoreVariant, wide_lanes
from vllm_kvtuner.kernels.trial import RUN_CAPABILITIES

CPU = torch.device("cpu")
ARCHITECTURES = {
    "sm_80": "A100",
    "sm_86": "RTX 30, A10",
    "sm_89": "RTX 40, L40S",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 50, RTX PRO Blackwell",
}
"""And cards of each."""
REGISTERS = 1 << 16
"""Of a multiprocessor; a CTA cannot start with more."""
DECODES = [
    Variant("K4V2", 128),
    Variant("K4V4", 128, group=8, transformed=True, offset_pairs=8, few=True),
    Variant("K2V2", 128, max_query_len=4, transformed=True, recent=64),
    Variant("K8V8", 64, group=8, max_query_len=4, window=1000, soft_cap=True, dtype=torch.float16),
]


def has_bulk_copies(arch: str) -> bool:
    return int(arch.removeprefix("sm_")) >= 90


def test_the_architectures_are_those_with_known_shared_memory():
    assert set(ARCHITECTURES) == set(SHARED_BYTES)


def test_the_page_names_what_is_compiled_and_what_was_run():
    rows = re.findall(
        r"^\| `(sm_\d+)` \| (.*?) \| yes \| (yes|no)", (DOCS / "operate/environment.md").read_text(), re.M
    )
    assert {arch: cards for arch, cards, _ in rows} == ARCHITECTURES
    run = {f"sm_{major}{minor}" for major, minor in RUN_CAPABILITIES}
    assert {arch for arch, _, answer in rows if answer == "yes"} == run


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", DECODES, ids=lambda variant: f"{variant.pair}-{variant.head_size}")
def test_decode_compiles(variant, arch):
    """Within what a CTA can have there, with the architecture's own copies and its tensor cores; ``-rP`` shows how many
    registers it takes."""
    settled = variant.settle(arch)
    cubin = variant.compile(arch)
    usage = resource_usage(cubin)
    found = instructions(cubin)
    print(f"{arch} ({ARCHITECTURES[arch]}): {usage['REG']} registers, {sum(found.values())} instructions")
    assert settled.shared_bytes <= SHARED_BYTES_OF_A_CTA[arch]
    assert usage["REG"] * settled.threads <= REGISTERS
    if not settled.config.fp16:  # passes of many rows keep what is seldom needed in local memory
        assert (usage["STACK"], usage["LOCAL"], found["LDL"], found["STL"]) == (0, 0, 0, 0)
    assert found["IMMA"] or found["HMMA"] or found["HGMMA"]
    assert b"__cuda_syscall" not in cubin, "an instruction that the architecture has not is a call into the driver"
    assert (found["UBLKCP"] > 0) == has_bulk_copies(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["reshape_and_cache", "gather_cache"])
def test_store_and_gather_compile(kernel, arch):
    """With all that they do besides; ``-rP`` as above."""
    rotary = rotary_table(128, True, 16, CPU)
    transforms = random_transforms(
        8, 128, CPU, rotary, offset=1.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    rows = RowVariant(make_layout("K4V2", 128), 8, torch.bfloat16, wide_lanes(128))
    if kernel == "reshape_and_cache":
        source = reshape_and_cache.source(transforms, StoreVariant(rows, window_block_size=16))
    else:
        source = gather_cache.source(transforms, rows)
    cubin = bytes(compile_cubin(source, arch, None).code)
    usage = resource_usage(cubin)
    print(f"{arch} ({ARCHITECTURES[arch]}): {usage['REG']} registers, {usage['STACK']} bytes of stack")
    assert usage["REG"] * 32 * NUM_WARPS <= REGISTERS
    assert usage["LOCAL"] == 0
