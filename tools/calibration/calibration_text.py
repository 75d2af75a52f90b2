"""Calibration text as token windows: the bundled set, plain text, or rows of JSON with a conversation or text each."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvtuner_tools.data_files import DocumentTokens, read_documents, token_documents

BUNDLED = "bundled"
"""Source of the set that ships with this package."""
MIN_WINDOW = 32
"""Tokens below which a window is none."""

BUNDLED_FILES = ("prose.txt", "conversations.jsonl", "novel.txt", "python_reference.jsonl", "python_code.jsonl")
HELDOUT = "bundled held-out text"
"""Source of the set that ``kvtuner evaluate`` takes without ``--data``. Calibration draws nothing of it."""
HELDOUT_FILES = ("heldout_novel.txt", "heldout_code.jsonl", "heldout_conversations.jsonl")
_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class CalibrationText:
    """Token windows and where they came from.

    Args:
        source: the file, or ``bundled``.
        sha256: digest of all bytes of the source.
        windows: token ids, one window each.
    """

    source: str
    sha256: str
    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    @property
    def identity(self) -> dict[str, Any]:
        """What artifacts say of it: source, sha256, tokens, windows and tokens of the longest one."""
        longest = max(map(len, self.windows))
        sizes = {"tokens": self.tokens, "windows": len(self.windows), "longest": longest}
        return {"source": self.source, "sha256": self.sha256, **sizes}


@dataclass(frozen=True)
class TextRequest:
    """A text to draw.

    Args:
        tokens: wanted, at least; the last window may go beyond by less than its length.
        context: tokens of a window at most.
        long_context: tokens of longer windows, which take half of the tokens, in whole windows, as far as there are
            documents of that length; 0 for none.
        name: of ``tokens`` in errors.
    """

    tokens: int
    context: int
    long_context: int = 0
    name: str = "tokens"


def load_text(data: Path | None, tokenizer: Any, *, tokens: int, context: int, seed: int) -> CalibrationText:
    """One text; see :func:`draw_texts`."""
    return draw_texts(data, tokenizer, [TextRequest(tokens, context)], seed=seed)[0]


def draw_texts(
    data: Path | None, tokenizer: Any, requests: Sequence[TextRequest], *, seed: int
) -> list[CalibrationText]:
    """Texts of one source, drawn at random; no part of the source is in two windows, and none depends on a later one.

    A plain text file is one document, a row of JSON another: a conversation in the model's chat template
    (its contents one below the other where the tokenizer has none, which is logged) or a text. Longer documents are cut
    into windows, and shorter ones joined until they fill one. Files of the bundled set give equal shares, as long as
    they last.

    Args:
        data: the file; None takes the bundled set.
        tokenizer: transformers tokenizer of the model.
        requests: in order of what they take first.
        seed: of the drawing.

    Raises:
        ProfileError: the file cannot be read, or every line in it that is of no known form, with file and line.
        ValueError: too little text for all, or numbers out of range.
    """
    if data is not None:
        return _draw_all(str(data), [data], tokenizer, requests, seed)
    return _draw_all(BUNDLED, [_FOLDER / name for name in BUNDLED_FILES], tokenizer, requests, seed)


def draw_heldout(tokenizer: Any, request: TextRequest) -> CalibrationText:
    """A text of the bundled held-out set, the same at each call, with the same shares as :func:`draw_texts`.

    Raises:
        ValueError: too little text, or numbers out of range.
    """
    return _draw_all(HELDOUT, heldout_paths(), tokenizer, [request], seed=0)[0]


def heldout_paths() -> list[Path]:
    """Files of the bundled held-out set."""
    return [_FOLDER / name for name in HELDOUT_FILES]


def _draw_all(
    source: str, paths: Sequence[Path], tokenizer: Any, requests: Sequence[TextRequest], seed: int
) -> list[CalibrationText]:
    """What :func:`draw_texts` draws, from these files."""
    for request in requests:
        if request.context < MIN_WINDOW:
            raise ValueError(f"context must be at least {MIN_WINDOW} tokens, but got {request.context}")
        if request.tokens < 1:
            raise ValueError(f"tokens must be at least 1, but got {request.tokens}")
    files = [_File(path, list(token_documents(path, read_documents(path), tokenizer)), seed) for path in paths]
    digest = files_sha256(paths)
    drawn = [_draw(files, request) for request in requests]
    if any(_tokens(windows) < request.tokens for windows, request in zip(drawn, requests, strict=True)):
        held, wanted = sum(map(_tokens, drawn)), sum(request.tokens for request in requests)
        names = " + ".join(request.name for request in requests)
        raise ValueError(f"{source}: {names} must be at most the {held:,} that the text holds, but got {wanted:,}")
    return [CalibrationText(source, digest, windows) for windows in drawn]


def files_sha256(paths: Sequence[Path]) -> str:
    """Digest of all bytes of some files, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


Windows = tuple[tuple[int, ...], ...]


def _tokens(windows: Windows) -> int:
    return sum(map(len, windows))


def _draw(files: "Sequence[_File]", request: TextRequest) -> Windows:
    """Windows of a request, from each file as many tokens as from the others while it has any; fewer in the end."""
    windows: list[tuple[int, ...]] = []
    taken = dict.fromkeys(files, 0)

    def take(context: int, tokens: int, *, only_whole: bool) -> None:
        left = list(files)
        total = 0
        while total < tokens and left:
            file = min(left, key=lambda each: taken[each])
            window = file.take(context, only_whole=only_whole)
            if window is None:
                left.remove(file)
                continue
            windows.append(window)
            taken[file] += len(window)
            total += len(window)

    if request.long_context > request.context:
        count = request.tokens // 2 // request.long_context
        take(request.long_context, count * request.long_context, only_whole=True)
    take(request.context, request.tokens - _tokens(tuple(windows)), only_whole=False)
    return tuple(windows)


class _File:
    """Documents of a file as tokens, from which windows are taken."""

    def __init__(self, path: Path, documents: list[DocumentTokens], seed: int) -> None:
        self._random = random.Random(f"{seed} {path.name}")
        self._random.shuffle(documents)
        self._pieces = documents

    def take(self, context: int, *, only_whole: bool) -> tuple[int, ...] | None:
        """Remove a window of at most ``context`` tokens, and give it; None where there is none.

        Args:
            context: tokens.
            only_whole: it must be full, and of one document.
        """
        if not self._pieces:
            return None
        first = self._cut(context, only_whole=only_whole)
        if first is None:
            if only_whole:
                return None
            first = self._next_short(context)
            assert first is not None
        window = [*first.prefix, *first.ids]
        while not only_whole and len(window) < context and (more := self._next_short(context)) is not None:
            room = context - len(window)
            if len(more.ids) > room:
                self._pieces.insert(0, replace(more, ids=more.ids[room:]))
            window += more.ids[:room]
        return tuple(window) if len(window) >= MIN_WINDOW else None

    def _cut(self, context: int, *, only_whole: bool) -> DocumentTokens | None:
        """A full window of one document, at a random place, each as likely as any other.

        Returns:
            None where there is none, or, unless ``only_whole``, where short documents are drawn in its place, as likely
            as their share of the tokens.
        """
        counts = [len(piece.ids) // (context - len(piece.prefix)) for piece in self._pieces]
        short = sum(len(piece.ids) for piece, count in zip(self._pieces, counts, strict=True) if not count)
        if not any(counts) or (not only_whole and self._random.random() * (short + sum(counts) * context) < short):
            return None
        (index,) = self._random.choices(range(len(counts)), counts)
        piece = self._pieces.pop(index)
        step = context - len(piece.prefix)
        start = self._random.randrange(counts[index]) * step
        rest = (piece.ids[:start], piece.ids[start + step :])
        self._pieces += [replace(piece, ids=ids) for ids in rest if ids]
        return replace(piece, ids=piece.ids[start : start + step])

    def _next_short(self, context: int) -> DocumentTokens | None:
        """Remove the first document that does not fill a window."""
        for index, piece in enumerate(self._pieces):
            if len(piece.ids) < context - len(piece.prefix):
                return self._pieces.pop(index)
        return None
