"""The CUDA sources through the compiler, which needs no GPU, and the cache of what it makes."""

import ctypes
import dataclasses
import gc
import itertools
import os
import re
import resource
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.cubin import local_memory_instructions, resource_usage
from tests.helpers.decode_cases import HEAD_SIZES, linear_table, with_offset_pairs
from tests.helpers.paged_cache import make_layout, random_transforms
from vllm_kvtuner.kernels.contract import Span
from vllm_kvtuner.kernels.cuda import (
    build,
    feedback_store,
    gather_cache,
    keep_rows,
    pack_rows,
    paged_attention_config,
    reshape_and_cache,
)
from vllm_kvtuner.kernels.cuda import paged_attention as cuda
from vllm_kvtuner.kernels.cuda import variant as variants
from vllm_kvtuner.kernels.cuda.page_layout import page_layout
from vllm_kvtuner.kernels.cuda.rows import RowVariant, StoreVariant
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms

CPU = torch.device("cpu")
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
SHARED_BYTES |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 100 << 10)
"""Shared memory of a multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability)."""
CARDS = {arch: paged_attention_config.Multiprocessor(size, arch == "sm_90") for arch, size in SHARED_BYTES.items()}
SHARED_BYTES_OF_A_CTA = {arch: size - 1024 for arch, size in SHARED_BYTES.items()}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a layer and a batch ask of the compiler; knobs are the defaults."""

    pair: str
    head_size: int
    group: int = 4
    block_size: int = 16
    max_query_len: int = 1
    transformed: bool = False
    offset_pairs: int = 0
    window: int | None = None
    soft_cap: bool = False
    recent: int | None = None
    sink_tokens: int = 0
    few: bool = False
    dtype: torch.dtype = torch.bfloat16
    sinks: torch.dtype | None = None

    def settle(self, arch: str) -> variants.CompiledVariant:
        switches = dict.fromkeys(("equalization", "key_hadamard", "value_hadamard"), self.transformed)
        rotary = linear_table(self.head_size, True, 2, CPU) if self.offset_pairs else None
        transforms = random_transforms(1, self.head_size, CPU, rotary, offset=float(rotary is not None), **switches)
        if rotary is not None:
            transforms = with_offset_pairs(transforms, self.offset_pairs)
        layout, card = make_layout(self.pair, self.head_size, self.block_size), CARDS[arch]
        rows = paged_attention_config.pass_rows(
            self.group * self.max_query_len, variants.needs_of(layout, transforms), card
        )
        call = variants.Variant(
            layout, self.group, rows, self.dtype,
            Span(self.window, self.recent or 0, self.sink_tokens), self.soft_cap, self.recent is not None, self.few,
            sinks=self.sinks,
        )  # fmt: skip
        return call.settle(transforms, card)

    def compile(self, arch: str) -> bytes:
        return bytes(build.compile_cubin(self.settle(arch).source(), arch, None).code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        Variant("K8V8", 128),
        Variant("K8V4", 128, transformed=True),
        Variant("K8V2", 64, block_size=64),
        Variant("K4V8", 96, group=3, window=100, soft_cap=True),
        Variant("K4V4", 128, transformed=True, offset_pairs=8),
        Variant("K4V2", 128, block_size=128),
        Variant("K2V8", 64, group=1, dtype=torch.float16),
        Variant("K2V4", 96),
        Variant("K2V2", 128),
        Variant("K4V4", 128, transformed=True, recent=64),
        Variant("K2V2", 128, window=100, recent=64, sink_tokens=4),
        Variant("K8V8", 128, window=64, recent=0),
        Variant("K4V4", 128, few=True),
        Variant("K2V2", 128, transformed=True, offset_pairs=8, few=True),
        Variant("K2V2", 128, transformed=True, offset_pairs=64),
        Variant("K4V4", 128, group=8, transformed=True, offset_pairs=8),
        Variant("K4V2", 128, group=7, transformed=True, offset_pairs=8, few=True),
        Variant("K4V4", 192, group=8),
        Variant("K4V4", 256, group=8),
        Variant("K2V2", 256, group=8, few=True),
        Variant("K8V8", 128, group=16),
        Variant("K4V4", 128, group=12),
        Variant("K4V2", 64, group=16, few=True),
        Variant("K2V2", 128, group=16, max_query_len=1),
        Variant("K2V2", 64, group=8),
        Variant("K4V2", 64, group=8, window=128, sinks=torch.bfloat16),
        Variant("K4V4", 64, group=16, transformed=True, recent=64, sinks=torch.float32),
    ],
    ids=lambda variant: (
        f"{variant.pair}-{variant.head_size}" + (f"-recent{variant.recent}" * (variant.recent is not None))
    ),
)
def test_nothing_spills_where_decoding_is_fastest(variant):
    """On sm_90 as many CTAs as the knobs ask for fit into the registers, but where heads of 256 have an offset too.

    Passes of 16 rows keep a few numbers elsewhere that no loop needs.
    """
    cubin, settled = variant.compile("sm_90"), variant.settle("sm_90")
    usage = resource_usage(cubin)
    assert usage["REG"] * settled.threads * settled.config.min_ctas <= 1 << 16
    many_rows = settled.variant.pass_rows > 8
    assert local_memory_instructions(cubin) <= (8 if many_rows else 0)
    assert many_rows or (usage["STACK"], usage["LOCAL"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("sm_80", Variant("K4V4", 128, block_size=64)),
        ("sm_80", Variant("K2V4", 96, group=7, transformed=True, offset_pairs=13)),
        ("sm_80", Variant("K8V8", 256, window=4096)),
        ("sm_90", Variant("K4V2", 256, group=8, transformed=True)),
        ("sm_90", Variant("K4V4", 128, group=1, max_query_len=16, soft_cap=True, dtype=torch.float16)),
        ("sm_90", Variant("K8V4", 128, transformed=True, offset_pairs=64)),
        ("sm_90", Variant("K8V8", 256, group=8, transformed=True, offset_pairs=128)),
        ("sm_80", Variant("K4V2", 64, transformed=True, offset_pairs=16, few=True)),
        ("sm_80", Variant("K4V2", 128, group=8, max_query_len=4, recent=32)),
        ("sm_120", Variant("K4V2", 128)),
        ("sm_120", Variant("K2V2", 64, group=8, transformed=True, offset_pairs=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.pair}-{value.head_size}",
)
def test_every_family_compiles(arch, variant):
    """With the architecture's own path (bulk copies or cp.async), within what a CTA can have of shared memory."""
    assert variant.settle(arch).shared_bytes <= SHARED_BYTES_OF_A_CTA[arch]
    assert resource_usage(variant.compile(arch))["REG"] <= 255


def test_a_source_that_does_not_compile_says_why():
    source = Variant("K4V4", 128).settle("sm_90").source()
    source = source._replace(macros=tuple({**dict(source.macros), "HEAD_SIZE": 24}.items()))
    with pytest.raises(Exception, match="head size") as caught:
        build.compile_cubin(source, "sm_90", None)
    assert type(caught.value).__name__ == "NVRTCError"


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("arch", "head_sizes"), [("sm_80", (*HEAD_SIZES, 192)), ("sm_90", (*HEAD_SIZES, 192)), ("sm_120", HEAD_SIZES[:3])]
)
def test_default_knobs_fit_the_multiprocessor(arch, head_sizes):
    for pair, head_size, block_size in itertools.product(QUANTIZED_PAIRS, head_sizes, (16, 48, 64, 128, 256)):
        layout = make_layout(pair.name, head_size, block_size)
        card = CARDS[arch]
        for pairs, terms, few in itertools.product((0, 8, head_size // 2), (1, 2), (False, True)):
            needs = paged_attention_config.Needs(layout, pairs, terms, few)
            for rows in paged_attention_config.PASS_ROWS:
                config = paged_attention_config.decode_config(rows, needs, card)
                if config is None:
                    assert rows > 8, "there are always passes of 8 rows, of which every batch can be made"
                    continue
                cta = paged_attention_config.shared_bytes(rows, needs, config)
                assert config.min_ctas * (cta + paged_attention_config.RESERVED_SHARED_BYTES) <= card.shared_bytes
                assert cta <= SHARED_BYTES_OF_A_CTA[arch]
                assert block_size % config.stage_tokens == 0 or config.stage_tokens % block_size == 0
                assert config.stage_tokens % 16 == 0 and config.min_ctas >= 1
                assert config.team_warps == 1 or config.num_warps % config.team_warps == 0
                warps = config.min_ctas * config.num_warps
                assert warps <= paged_attention_config.MAX_WARPS_PER_MULTIPROCESSOR, "workspace.aside has room"


@pytest.mark.parametrize(
    ("arch", "head_size", "rows", "want"),
    [
        ("sm_90", 128, 1, 4), ("sm_90", 128, 5, 8), ("sm_90", 128, 12, 16), ("sm_90", 128, 17, 32),
        ("sm_90", 128, 33, 64), ("sm_90", 128, 300, 64), ("sm_90", 256, 300, 32), ("sm_90", 96, 300, 32),
        ("sm_80", 128, 300, 32), ("sm_80", 256, 300, 16), ("sm_120", 64, 24, 32),
        ("sm_90", 192, 300, 16),  # a warp of a team would have the codes of one byte and a half
    ],
)  # fmt: skip
def test_rows_take_as_few_passes_as_fit(arch, head_size, rows, want):
    needs = paged_attention_config.Needs(make_layout("K4V4", head_size))
    assert paged_attention_config.pass_rows(rows, needs, CARDS[arch]) == want


@pytest.mark.parametrize(
    ("layout", "transforms", "soft_cap", "reason"),
    [
        pytest.param(make_layout("K4V4", 128), LayerTransforms(), 0.0, None, id="plain"),
        pytest.param(make_layout("K4V2", 96), LayerTransforms(), 0.0, "head_size 96 with 2-bit values", id="96 V2"),
        pytest.param(make_layout("K4V4", 80), LayerTransforms(), 0.0, "head_size 80", id="80"),
        pytest.param(make_layout("K4V4", 512), LayerTransforms(), 0.0, "head_size 512 is above 256", id="512"),
        pytest.param(
            make_layout("K4V4", 64), random_transforms(1, 64, CPU, offset=1.0), 0.0, None, id="offset not rotated"
        ),
        pytest.param(
            make_layout("K4V4", 64), random_transforms(1, 64, CPU, offset=1.0), 30.0, "some of it is not rotated",
            id="offset not rotated, capped",
        ),
        pytest.param(
            make_layout("K4V4", 64), random_transforms(1, 64, CPU, linear_table(32, True, 9, CPU), offset=1.0), 30.0,
            "some of it is not rotated", id="offset partly rotated, capped",
        ),
        pytest.param(
            make_layout("K4V4", 64), random_transforms(1, 64, CPU, linear_table(64, True, 9, CPU), offset=1.0), 30.0,
            None, id="offset rotated, capped",
        ),
        pytest.param(
            make_layout("K4V4", 64),
            random_transforms(
                1, 64, CPU, dataclasses.replace(linear_table(64, True, 9, CPU), frequencies=None), offset=1.0
            ),
            0.0, "not proportional to the position", id="offset rotated otherwise",
        ),
    ],
)  # fmt: skip
def test_unsupported_layers_are_named(layout, transforms, soft_cap, reason):
    got = cuda.unsupported(layout, transforms, soft_cap)
    assert got == reason if reason is None else reason in got


def test_a_sink_needs_all_of_the_key_offset():
    """A softmax with a sink is another if all logits of tokens move alike."""
    layout, unrotated = make_layout("K4V4", 64), random_transforms(1, 64, CPU, offset=1.0)
    assert "a sink needs all of the key offset" in cuda.unsupported(layout, unrotated, has_sinks=True)
    rotated = random_transforms(1, 64, CPU, linear_table(64, True, 9, CPU), offset=1.0)
    assert cuda.unsupported(layout, rotated, has_sinks=True) is None


SMALL = RowVariant(make_layout("K8V8", 64), 1, torch.float16, 8)
SMALL_FEEDBACK = StoreVariant(SMALL._replace(layout=make_layout("K4V4", 64)))
WITH_WINDOW = SMALL_FEEDBACK._replace(window_block_size=16)


def small_source() -> build.Source:
    return gather_cache.source(LayerTransforms(), SMALL)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "kernels"
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(folder))
    return folder


@pytest.mark.slow
def test_compiled_code_is_kept_for_the_next_process(cache_folder, monkeypatch):
    """Keyed by what decides it: another macro, architecture or source is compiled on its own."""

    def compiled(arch="sm_90", macro=0):
        source = small_source()
        source = source._replace(macros=(*source.macros, ("UNUSED", macro)))
        cubin = build.compile_cubin(source, arch, build.kernel_cache())
        return bytes(cubin.code), len(build.kernel_cache())

    first, entries = compiled()
    assert entries == 1
    assert cache_folder.stat().st_mode & 0o077 == 0
    (entry,) = (path for path in cache_folder.rglob("*") if path.is_file() and path.read_bytes() == first)
    entry.write_bytes(first + b"kept")
    assert compiled() == (first + b"kept", 1), "taken from the folder"
    assert compiled(macro=1)[1] == 2
    assert compiled("sm_80")[1] == 3
    text = small_source().text()
    monkeypatch.setattr(build.Source, "text", lambda source: text + "// changed\n")
    assert compiled()[1] == 4


SOURCES = {
    "feedback_store": (
        feedback_store.ARGUMENTS,
        lambda: feedback_store.source(LayerTransforms(), feedback_store.FeedbackVariant(SMALL_FEEDBACK, (1, 1))),
    ),
    "gather_cache": (gather_cache.ARGUMENTS, small_source),
    "keep_rows": (keep_rows.ARGUMENTS, lambda: keep_rows.source(64, 2, torch.bfloat16, 16)),
    "pack_rows": (
        pack_rows.ARGUMENTS,
        lambda: pack_rows.source(LayerTransforms(), feedback_store.FeedbackVariant(WITH_WINDOW, (1, 1))),
    ),
    "paged_attention": (variants.ARGUMENTS, lambda: Variant("K4V2", 64, block_size=128).settle("sm_90").source()),
    "reshape_and_cache": (
        reshape_and_cache.ARGUMENTS,
        lambda: reshape_and_cache.source(LayerTransforms(), StoreVariant(SMALL)),
    ),
}


def test_sources_are_whole():
    assert set(SOURCES) == {path.stem for path in build.SOURCES.glob("*.cu")}
    for stem, (_, source) in SOURCES.items():
        assert source().stem == stem and "#include" not in source().text()


@pytest.mark.slow
@pytest.mark.parametrize("stem", SOURCES)
def test_the_hosts_arguments_are_the_kernels(stem):
    """By name, in order, in place and of one size: the driver copies as many bytes of each as the kernel takes."""
    arguments, source = SOURCES[stem]
    parts = {"Arguments": arguments}
    if stem == "pack_rows":
        parts |= {"Layer": pack_rows.LAYER, "Step": pack_rows.STEP}
    checks = []
    for part, fields in parts.items():
        structure = fields.structure
        assert [name for name, _ in structure._fields_] == [field.name for field in fields.fields]
        checks.append(f'static_assert(sizeof({part}) == {ctypes.sizeof(structure)}, "all");')
        for field, offset in zip(fields.fields, structure.offsets.tolist(), strict=True):
            assert getattr(structure, field.name).offset == offset
            # How the compiler itself spells offsetof.
            place = f"(unsigned long long)__INTADDR__(&(({part}*)0)->{field.name})"
            checks.append(f'static_assert({place} == {offset}, "{field.name}");')
            checks.append(f'static_assert(sizeof({part}::{field.name}) == {ctypes.sizeof(field.host_type)}, "size");')
    headers = dict(source().headers)
    checked = source()._replace(
        headers=tuple({**headers, "arguments.cuh": headers["arguments.cuh"] + "\n".join(checks) + "\n"}.items())
    )
    assert f".text.{stem}".encode() in bytes(build.compile_cubin(checked, "sm_90", None).code)


@pytest.mark.parametrize(("dependent", "overlaps"), [(True, True), (True, False), (False, True)])
def test_a_launch_hands_every_argument_to_the_driver(dependent, overlaps, monkeypatch):
    """Each where it stands in the structure; overlapping only where both the caller and the card allow it."""
    launches = []

    def driver_launch(config, function, parameters, extra):
        values = [ctypes.c_uint32.from_address(int(address)).value for address in parameters]
        launches.append((config, function, values, extra))
        return (build.driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(build.driver, "cuLaunchKernelEx", driver_launch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    kernel = build.BuiltKernel("gather_cache", None, 1234, 128, 1000, 264, overlaps)
    names = [field.name for field in gather_cache.ARGUMENTS.fields]
    given = {name: index + 1 for index, name in enumerate(names)}
    kernel.launch(7, gather_cache.ARGUMENTS.structure(**given), dependent=dependent)
    ((config, function, values, extra),) = launches
    assert (function, values, extra) == (1234, list(given.values()), 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (7, 1, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream)) == (1000, 77)
    serialization = build.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attributes = [(it.id, it.value.programmaticStreamSerializationAllowed) for it in config.attrs]
    assert attributes == [(serialization, 1)] * (dependent and overlaps)


def test_the_driver_says_why_it_refuses(monkeypatch):
    refused = build.driver.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(build.driver, "cuLaunchKernelEx", lambda *arguments: (refused,))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    kernel = build.BuiltKernel("gather_cache", None, 1234, 128, 1000, 264, True)
    with pytest.raises(RuntimeError, match=r"gather_cache: 7 CTAs of 128 threads .* CUDA_ERROR_INVALID_VALUE"):
        kernel.launch(7, gather_cache.ARGUMENTS.structure())


def test_the_header_of_a_page_has_the_layouts_numbers():
    chunk, piece = make_layout("K4V2", 64, 128), make_layout("K4V2", 64, 16)
    text = page_layout(Chunk=chunk, Piece=piece)
    structs = dict(re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL))
    read = {
        name: {constant: int(value) for constant, value in re.findall(r"constexpr int (\w+) = (\d+);", body)}
        for name, body in structs.items()
    }
    assert read == {"Chunk": chunk.constants(), "Piece": piece.constants()}
    # By hand from pages/layout.py's table: 128 tokens of 32 + 16 + 8 bytes.
    assert (read["Chunk"]["V_CODES"], read["Chunk"]["K_META"], read["Chunk"]["V_META"]) == (4096, 6144, 6656)
    assert (read["Chunk"]["BYTES"], read["Piece"]["BYTES"]) == (7168, 896)


@pytest.mark.parametrize("inner", [".", "entries"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_may_write_to_is_refused(cache_folder, inner, mode):
    build.kernel_cache()
    folder = cache_folder / inner
    folder.chmod(mode)
    with pytest.raises(ValueError, match=rf"^KVTUNER_KERNEL_CACHE: {folder.resolve()} must .* writable by no other"):
        build.kernel_cache()
    folder.chmod(0o755)
    build.kernel_cache()


def test_a_cache_of_somebody_else_is_refused(cache_folder, monkeypatch):
    build.kernel_cache()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=rf"must belong to user {owner + 1} .* belongs to {owner} "):
        build.kernel_cache()


def compile_store():
    return build.compile_cubin(small_source(), "sm_90", build.kernel_cache())


def test_a_group_writable_umask_makes_a_folder_that_is_trusted(cache_folder):
    """As ordinary users of several distributions have it: each kernel opens the folder again."""
    before = os.umask(0o002)
    try:
        for _ in range(2):
            compile_store()
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o022 for path in (cache_folder, cache_folder / "entries"))


@pytest.mark.parametrize("inner", ["", "entries", "tmp"])
def test_a_cache_that_cannot_be_made_is_the_users_error(cache_folder, inner):
    (cache_folder / inner).parent.mkdir(parents=True, exist_ok=True)
    (cache_folder / inner).write_text("a file in its place")
    with pytest.raises(ValueError, match=rf"^KVTUNER_KERNEL_CACHE: {cache_folder} must be a writable folder with room"):
        compile_store()


def test_a_cache_without_room_is_the_users_error(cache_folder):
    """The limit on what a process may write to a file stands for a full disk."""
    build.kernel_cache()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match="must be a writable folder with room, but got File too large"):
            compile_store()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == []
    compile_store()


@pytest.mark.slow
def test_what_was_built_is_kept_as_long_as_the_transforms():
    made = []

    @build.kept_with_transforms
    def make(transforms, *key):
        made.append(key)
        return len(made)

    ours, others = LayerTransforms(key_hadamard=True), LayerTransforms(key_equalization=torch.ones(1, 64))
    assert [make(ours, 4), make(ours, 2), make(others, 4), make(ours, 4)] == [1, 2, 3, 1]
    assert make(LayerTransforms(key_hadamard=True), 2) == 2, "equal transforms build the same"
    del others
    gc.collect()
    assert make(LayerTransforms(key_equalization=torch.ones(1, 64)), 4) == 4
