"""Libraries are compiled once, kept whole, and found again by what they were compiled from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kvtuner.kernels.contract import AttentionShape, Span
from vllm_kvtuner.kernels.cpu import build, kernels
from vllm_kvtuner.kernels.cpu.kernels import CompiledKernels, cpu_kernels
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels

HEAD_SIZE = 16
"""Compiled in a second or two."""
SHAPE = AttentionShape(1, 1, HEAD_SIZE, 1.0)


REMEMBERED = (build._library, build.compiler, build.compiler_version, build.processor, kernels._log_choice)


def forget():
    for remembered in REMEMBERED:
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty kernel cache, of a process that has compiled nothing."""
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(tmp_path / "kernels"))
    for name in ("CXX", "KVTUNER_CPU_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield tmp_path / "kernels" / "cpu"
    forget()


@pytest.fixture
def write_compiler(tmp_path, monkeypatch):
    """Makes a script the compiler; ``{compiler}`` in it is the real one."""
    real = build.compiler()

    def write(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script.format(compiler=real)}\n")
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
        forget()

    return write


@pytest.mark.slow
def test_a_library_is_compiled_once_and_kept(folder, write_compiler, tmp_path):
    write_compiler(f'echo run >> {tmp_path}/runs; exec {{compiler}} "$@"')
    build.library(HEAD_SIZE)
    build.library(HEAD_SIZE)
    (kept,) = folder.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    before = kept.stat()
    forget()
    assert build.library(HEAD_SIZE)._name == str(kept)
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    # To ask for its version, to compile, and to ask again.
    assert (tmp_path / "runs").read_text().count("run") == 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("source", lambda: build.source() + "// changed"),
        ("compiler_version", lambda: "another compiler 1.0"),
        ("processor", lambda: "x86_64\nflags\t: sse2"),
        ("OPTIONS", lambda: (*build.OPTIONS, "-DMORE")),
    ],
)
def test_what_a_library_is_compiled_from_is_in_its_name(name, change, monkeypatch):
    before = build.library_path(64, Path())
    changed = change()
    monkeypatch.setattr(build, name, changed if name == "OPTIONS" else lambda: changed)
    assert build.library_path(64, Path()) != before


def test_head_sizes_have_libraries_of_their_own():
    assert build.library_path(64, Path()) != build.library_path(128, Path())


@pytest.mark.slow
def test_two_processes_may_compile_at_once(folder):
    program = f"from vllm_kvtuner.kernels.cpu import build; build.library({HEAD_SIZE})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (kept,) = folder.iterdir()
    assert kept.suffix == ".so"
    build.library(HEAD_SIZE)
    assert list(folder.iterdir()) == [kept]


@pytest.mark.parametrize("end", ["exit 3", "kill -9 $$"], ids=["fails", "is killed"])
def test_a_compiler_that_stops_halfway_leaves_nothing_to_load(folder, write_compiler, end):
    # The last argument is the library's file.
    write_compiler(
        f'[ "$1" = --version ] && exec {{compiler}} --version\nfor last; do :; done; echo half > "$last"; {end}'
    )
    with pytest.raises(build.BuildError, match="failed: status"):
        build.library(HEAD_SIZE)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_is_killed_halfway_leaves_nothing_to_load(folder, write_compiler, tmp_path, monkeypatch):
    write_compiler(
        f'[ "$1" = --version ] && exec {{compiler}} --version\n'
        f'for last; do :; done; echo half > "$last"; touch {tmp_path}/begun; sleep 60'
    )
    program = f"from vllm_kvtuner.kernels.cpu import build; build.library({HEAD_SIZE})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    assert [path.suffix for path in folder.iterdir()] == [".unfinished"]
    monkeypatch.delenv("CXX")
    forget()
    build.library(HEAD_SIZE)
    assert sorted(path.suffix for path in folder.iterdir()) == [".so", ".unfinished"]


def no_compiler(monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    return r"no C\+\+ compiler \(no-such-compiler\) is installed"


def another_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/c++")
    return r"CXX names /no/such/c\+\+, which is not there"


def wrong_source(monkeypatch):
    monkeypatch.setattr(build, "PARTS", (*build.PARTS[:-1], "../build.py"))
    return r"c\+\+ failed: ../build.py.*error"


def no_folder(monkeypatch):
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", "/proc/kernels")
    return "KVTUNER_KERNEL_CACHE: /proc/kernels must be a writable folder"


@pytest.mark.quick(1)
@pytest.mark.parametrize("lack", [no_compiler, another_compiler, wrong_source, no_folder])
def test_without_a_library_the_reference_serves_and_the_log_says_so_once(lack, monkeypatch, caplog):
    reason = lack(monkeypatch)
    with caplog.at_level("INFO", logger="vllm"):
        served = [cpu_kernels(SHAPE, Span()) for _ in range(3)]
    assert {type(each) for each in served} == {ReferenceKernels}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(reason, record.getMessage())
    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "compiled")
    with pytest.raises(ValueError, match=f"^KVTUNER_CPU_KERNELS is 'compiled', but .*{reason}"):
        cpu_kernels(SHAPE, Span())


@pytest.mark.slow
def test_the_log_says_once_what_serves(caplog):
    with caplog.at_level("INFO", logger="vllm"):
        served = [cpu_kernels(SHAPE, Span()) for _ in range(3)]
    assert {type(each) for each in served} == {CompiledKernels}
    (record,) = caplog.records
    assert record.getMessage().startswith(f"CPU kernels: compiled by {build.compiler_version()}, ready in ")


def test_the_reference_can_be_asked_for(monkeypatch, folder):
    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "reference")
    assert type(cpu_kernels(SHAPE, Span())) is ReferenceKernels
    assert kernels.choice(HEAD_SIZE) == "reference, since KVTUNER_CPU_KERNELS is 'reference'"
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 80])
def test_the_compiler_has_nothing_to_warn_of(head_size):
    command = [
        build.compiler(),
        *build._options(head_size),
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-x",
        "c++",
    ]
    subprocess.run([*command, "-"], input=build.source(), text=True, check=True)
