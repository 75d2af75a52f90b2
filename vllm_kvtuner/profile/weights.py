"""An identity of a model's weights that is made without reading them all.

Fine-tunes of a model have its shapes, its tensors' names and its files' sizes, and other weights. So the digest takes
a piece of every tensor. Statics are of one set of weights, and what was measured of a profile is too.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

ANY_WEIGHTS = "any"
"""What a profile says in place of a digest to be served with any weights."""
DIGEST = re.compile("[0-9a-f]{16}")
PIECE_BYTES = 4096
"""Bytes of a tensor that are read: its middle ones."""
PIECES = 64
"""Pieces of a file whose tensors this package does not find."""
INDEX = "model.safetensors.index.json"
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf")
_MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""


def weights_digest(folder: Path) -> str | None:
    """16 hexadecimal digits of a model folder's weights; None where it holds none, or not all of them.

    It follows from each tensor's name, dtype, shape and middle bytes, not from how tensors are spread over files.
    Weights in another format than safetensors are identified by their files' sizes, and 64 pieces of each.
    """
    try:
        files = _safetensors(folder)
        if files is not None:
            pieces = [piece for file in files for piece in _tensors(file)]
        else:
            others = next(filter(None, (sorted(folder.glob(pattern)) for pattern in OTHER_FORMATS)), [])
            pieces = [_spread(file) for file in others]
    except (OSError, ValueError, KeyError, TypeError):  # incomplete or damaged, which loading reports best
        return None
    if not pieces:
        return None
    digest = hashlib.sha256()
    for piece in sorted(pieces):
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:16]


def weights_bytes(folder: Path) -> int | None:
    """Bytes of the weights' files; None where there are none, or not all."""
    try:
        files = _safetensors(folder)
        if files is None:
            files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in OTHER_FORMATS)), [])
        return sum(file.stat().st_size for file in files) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _safetensors(folder: Path) -> list[Path] | None:
    """The files that a loader takes: the index's, or all but a second copy in Mistral's own naming."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if not file.name.startswith("consolidated")] or files or None


def _tensors(file: Path) -> Iterable[bytes]:
    """For every tensor of a safetensors file its name, dtype, shape and middle bytes."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file}: a header must be at most {_MAX_HEADER_BYTES} bytes, but got {length}")
        header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            size = min(PIECE_BYTES, end - begin)
            start = 8 + length + begin + (end - begin - size) // 2
            piece = os.pread(opened.fileno(), size, start)
            if len(piece) < size:
                raise ValueError(f"{file}: {name} must be whole, but got {len(piece)} of {size} bytes")
            yield json.dumps([name, tensor["dtype"], tensor["shape"]]).encode() + b"\0" + piece


def _spread(file: Path) -> bytes:
    """A file's size and evenly spread pieces."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        starts = sorted({max(0, size - PIECE_BYTES) * index // (PIECES - 1) for index in range(PIECES)})
        return size.to_bytes(8, "little") + b"".join(os.pread(opened.fileno(), PIECE_BYTES, each) for each in starts)
