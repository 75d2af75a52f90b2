"""Runs the CUDA sources on a CPU, under their own Python launchers: what a kernel computes, not how fast.

The host's compiler builds a source with `cuda_emulator.h` in place of CUDA, and with the bodies below in place of the
functions that src/device writes in PTX. It is compiled as for sm_80, so that copies are plain loads.
"""

import ctypes
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kvtuner.kernels.cuda import (
    feedback_store,
    gather_cache,
    keep_rows,
    pack_rows,
    paged_attention,
    reshape_and_cache,
)
from vllm_kvtuner.kernels.cuda.build import SOURCES, Source

HEADER = Path(__file__).with_name("cuda_emulator.h")
COMPILER = shutil.which("g++")
OPTIONS = ("-O1", "-std=c++20", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
OPTIONS += ("-shared", "-fPIC")
NUM_SMS = 3
CTAS = NUM_SMS
"""CTAs at once: few, so that each has several requests and requests have several CTAs."""
SHARED_BYTES_PER_MULTIPROCESSOR = 228 * 1024

_MMA = "const u32 words[] = {{{words}}}; multiply<{k}, {per_word}>(c, words, {a}, {b}, __LINE__, {kinds});"
BODIES = {
    "shared_address(": "return (u32)((const u8*)pointer - memory);",
    "exp2_approx(": "return exp2f(x);",
    "log2_approx(": "return std::log2(x);",
    "max_fp16(": "return max_halves(a, b);",
    "meet_warps(int number, int threads)": "meet_some(number, threads, __LINE__);",
    "reciprocal_approx(": "return 1.0f / x;",
    "unpack_fp16(": "return {half_to_float(word & 0xFFFF), half_to_float(word >> 16)};",
    "pack_fp16(": "return float_to_half(low) | float_to_half(high) << 16;",
    "from_fp16(": "return half_to_float(bits);",
    "to_fp16(": "return (u16)float_to_half(x);",
    "to_bf16(": "return (u16)float_to_bfloat(x);",
    "pack_bf16(": "return float_to_bfloat(low) | float_to_bfloat(high) << 16;",
    "multiprocessors(": f"return {NUM_SMS};",
    "arrive(": "return atomicAdd(counter, 1);",
    "mma_u8s8_k32(": _MMA.format(
        words="a0, a1, a2, a3, b0, b1", k=32, per_word=4, a=4, b=2, kinds="unsigned_byte, signed_byte"
    ),
    "mma_u8s8_k16(": _MMA.format(words="a0, a1, b0", k=16, per_word=4, a=2, b=1, kinds="unsigned_byte, signed_byte"),
    "mma_u8u8_k32(": _MMA.format(
        words="a0, a1, a2, a3, b0, b1", k=32, per_word=4, a=4, b=2, kinds="unsigned_byte, unsigned_byte"
    ),
    "mma_u8u8_k16(": _MMA.format(words="a0, a1, b0", k=16, per_word=4, a=2, b=1, kinds="unsigned_byte, unsigned_byte"),
    "mma_fp16(": _MMA.format(
        words="a0, a1, a2, a3, b0, b1", k=16, per_word=2, a=4, b=2, kinds="half_number, half_number"
    ),
    "group_mma(float (&c)[TILES][4]": (
        "for (int tile = 0; tile < TILES; tile++) { const u8* of_tile = memory + b.low * 16 + tile * 256;"
        "if (!ADD) for (float& sum : c[tile]) sum = 0;"
        "const u32 b0 = *(const u32*)(of_tile + LANE * 4), b1 = *(const u32*)(of_tile + 128 + LANE * 4);"
        "const u32 words[] = {a0, a1, a2, a3, b0, b1};"
        "multiply<16, 2>(c[tile], words, 4, 2, __LINE__, half_number, half_number); }"
    ),
    "low_of(": "return address / 16;",
    "hold(float (&c)[TILES][4]": "",
    "meet_warps_any(": "return meet_some(number, threads, __LINE__, vote);",
    "store_transposed(u8* row, u32 a, u32 b)": "const u32 words[] = {a, b}; write_transposed(row, words, __LINE__);",
    "store_transposed(u8* row, u32 a, u32 b, u32 c, u32 d)": (
        "const u32 words[] = {a, b, c, d}; write_transposed(row, words, __LINE__);"
    ),
    "transpose_8x8(": "return transposed(word, __LINE__);",
    "load_matrices(u32 (&words)[2]": "read_matrices<false>(words, row, __LINE__);",
    "load_matrices(u32 (&words)[4]": "read_matrices<false>(words, row, __LINE__);",
    "load_transposed(u32 (&words)[2]": "read_matrices<true>(words, row, __LINE__);",
    "load_transposed(u32 (&words)[4]": "read_matrices<true>(words, row, __LINE__);",
    "copy_16(": "copy_bytes<16>(memory + target, source, __LINE__);",
    "copy_8(": "copy_bytes<8>(memory + target, source, __LINE__);",
}
"""Bodies of functions in src/device, by what follows their return type."""


def available() -> str | None:
    """Why nothing can be emulated here, or None."""
    if COMPILER is None:
        return "no g++ on the path"
    if platform.machine() != "x86_64":
        return "fp16 is converted by x86 instructions"
    return None


def emulated_source(source: Source) -> str:
    """The kernel's source with the bodies of :data:`BODIES` and without inline PTX."""
    text = source.text()
    device = "".join(path.read_text() for path in (SOURCES / "device").iterdir())
    for name, body in BODIES.items():
        head = re.compile(rf"__forceinline__ [\w ]*\b{re.escape(name)}[^{{]*\{{")
        assert head.search(device), f"src/device has no function {name}...)"
        match = head.search(text)
        if match is None:  # in a part that this kernel does not include
            continue
        line_end = text.index("\n", match.end())
        one_line = text[line_end - 1] == "}"
        end = line_end - 1 if one_line else text.index("\n}\n", match.end()) + 1
        text = f"{text[: match.end()]} {body} {text[end:]}"
    text = re.sub(r'asm( volatile)?\((?:[^;"]|"(?:[^"\\]|\\.)*")*\);', "", text)
    return text.replace("extern __shared__ __align__(128) u8 memory[];", "").replace("__restrict__", "")


@functools.cache
def _library(source: Source, shared_bytes: int) -> ctypes.CDLL:
    kernel = emulated_source(source)
    names = re.search(r"^#define ARGUMENT_NAMES (.*)$", kernel, re.M)
    assert names, "a kernel's arguments are generated"
    given = ", ".join(f"given.{name}" for name in names[1].split(", "))
    text = "\n".join(
        [
            f'#include "{HEADER}"',
            f"alignas(128) static unsigned char memory[{max(shared_bytes, 16)}];",
            *(f"#define {name} {value}" for name, value in source.macros),
            kernel,
            "static Arguments given;",
            'extern "C" void emulate(unsigned ctas, int threads, const Arguments* arguments) {',
            "given = *arguments;",
            "for (unsigned cta = 0; cta < ctas; cta++) {",
            # As a CTA finds it: what an earlier one may have left there.
            "std::fill_n((int*)memory, sizeof(memory) / 4, 1);",
            f"run_cta(cta, ctas, threads, [] {{ {source.stem}({given}); }});",
            "}",
            "}",
        ]
    )
    digest = hashlib.sha256((text + HEADER.read_text()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"cuda_emulator_{digest}"
    if not (folder / "kernel.so").exists():
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "kernel.cpp").write_text(text)
            command = [COMPILER, *OPTIONS, "-o", f"{scratch}/kernel.so", f"{scratch}/kernel.cpp"]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr[:4000]
            folder.mkdir(exist_ok=True)
            shutil.move(f"{scratch}/kernel.so", folder / "kernel.so")
    return ctypes.CDLL(str(folder / "kernel.so"))


class EmulatedKernel:
    """Stands for build.BuiltKernel."""

    max_ctas = CTAS

    def __init__(self, source: Source, block: int, shared_bytes: int) -> None:
        self.block = block
        self._function = _library(source, shared_bytes).emulate

    def launch(self, grid: int, arguments: ctypes.Structure, dependent: bool = False) -> None:
        self._function(ctypes.c_uint(grid), ctypes.c_int(self.block), ctypes.byref(arguments))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the emulated kernels under the launchers, on tensors in the CPU's memory."""

    def build(source: Source, block: int, shared_bytes: int, device: torch.device) -> EmulatedKernel:
        return EmulatedKernel(source, block, shared_bytes)

    put_under_launchers(monkeypatch, build)


def put_under_launchers(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any]) -> None:
    """Let launchers take their kernels from ``build``, whose arguments are build.build's, as for a small Hopper."""
    for launcher in (feedback_store, gather_cache, keep_rows, pack_rows, paged_attention, reshape_and_cache):
        monkeypatch.setattr(launcher, "build", build)
    properties = SimpleNamespace(
        multi_processor_count=NUM_SMS,
        shared_memory_per_multiprocessor=SHARED_BYTES_PER_MULTIPROCESSOR,
        major=9,
        minor=0,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
