"""Calibration text as token windows: the bundled set, plain text, or rows of JSON with a conversation or text each."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvtuner_tools.data_files import DocumentTokens, read_data, read_documents, token_documents
from vllm_kvtuner.profile.problems import ProfileError, show

BUNDLED = "bundled"
"""Source of the set that ships with this package."""
MIN_WINDOW = 32
"""Tokens below which a window is none."""

BUNDLED_KINDS = {
    "conversations.jsonl": "chat",
    "prose.txt": "prose",
    "novel.txt": "novel",
    "python_reference.jsonl": "reference",
    "python_code.jsonl": "code",
}
"""What each file of the bundled set holds; a text with few windows has them of the first ones."""
BUNDLED_FILES = tuple(BUNDLED_KINDS)
GENERATED = "generated"
"""Kind of what the model wrote itself, which comes before all others."""
GENERATED_FILE = "generated.jsonl"
"""Its name in an output folder."""
HELDOUT = "bundled held-out text"
"""Source of the set that ``kvtuner evaluate`` takes without ``--data``. Calibration draws nothing of it."""
HELDOUT_KINDS = {"heldout_novel.txt": "novel", "heldout_code.jsonl": "code", "heldout_conversations.jsonl": "chat"}
HELDOUT_FILES = tuple(HELDOUT_KINDS)
_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class CalibrationText:
    """Token windows and where they came from.

    Args:
        source: the file, or ``bundled``.
        sha256: digest of all bytes of the source.
        windows: token ids, one window each.
        kinds: of the windows: what the bundled file holds, ``generated``, or the name of the user's file.
    """

    source: str
    sha256: str
    windows: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class OwnText:
    """What the model wrote itself.

    Args:
        path: of the file that it is kept in.
        documents: token ids.
    """

    path: Path
    documents: tuple[DocumentTokens, ...]


def read_generated(out: Path) -> OwnText | None:
    """The text of an output folder; None where there is none.

    Raises:
        ProfileError: a row that cannot be used.
    """
    path = out / GENERATED_FILE
    if not path.exists():
        return None
    rows = read_data(path, _row)
    if isinstance(rows, str) or not rows:
        raise ProfileError([f"{path}: the file must hold rows of JSON with ids, but got none"])
    return OwnText(path, tuple(DocumentTokens((), ids, True) for _, ids in rows))


def load_text(data: Path | None, tokenizer: Any, *, tokens: int, context: int, seed: int) -> CalibrationText:
    """One text; see :func:`draw_texts`."""
    return draw_texts(data, tokenizer, [TextRequest(tokens, context)], seed=seed)[0]


def draw_texts(
    data: Path | None,
    tokenizer: Any,
    requests: Sequence[TextRequest],
    *,
    seed: int,
    generated: OwnText | None = None,
) -> list[CalibrationText]:
    """Texts of one source, drawn at random; no part of the source is in two windows, and none depends on a later one.

    A plain text file is one document, a row of JSON another: a conversation in the model's chat template
    (its contents one below the other where the tokenizer has none, which is logged) or a text. Longer documents are cut
    into windows, and shorter ones joined until they fill one. Files of the bundled set and generated text give equal
    shares, as long as they last.

    Args:
        data: the file; None takes the bundled set.
        tokenizer: transformers tokenizer of the model.
        requests: in order of what they take first.
        seed: of the drawing.
        generated: what the model wrote itself, one file more.

    Raises:
        ProfileError: the file cannot be read, or every line in it that is of no known form, with file and line.
        ValueError: too little text for all, or numbers out of range.
    """
    kinds = {_FOLDER / name: kind for name, kind in BUNDLED_KINDS.items()} if data is None else {data: data.name}
    return _draw_all(BUNDLED if data is None else str(data), kinds, tokenizer, requests, seed=seed, generated=generated)


def draw_heldout(tokenizer: Any, request: TextRequest) -> CalibrationText:
    """A text of the bundled held-out set, the same at each call, with the same shares as :func:`draw_texts`.

    Raises:
        ValueError: too little text, or numbers out of range.
    """
    kinds = dict(zip(heldout_paths(), HELDOUT_KINDS.values(), strict=True))
    return _draw_all(HELDOUT, kinds, tokenizer, [request], seed=0)[0]


def heldout_paths() -> list[Path]:
    """Files of the bundled held-out set."""
    return [_FOLDER / name for name in HELDOUT_FILES]


def _draw_all(
    source: str,
    kinds: dict[Path, str],
    tokenizer: Any,
    requests: Sequence[TextRequest],
    *,
    seed: int,
    generated: OwnText | None = None,
) -> list[CalibrationText]:
    """What :func:`draw_texts` draws, from files of these kinds."""
    for request in requests:
        if request.context < MIN_WINDOW:
            raise ValueError(f"context must be at least {MIN_WINDOW} tokens, but got {request.context}")
        if request.tokens < 1:
            raise ValueError(f"tokens must be at least 1, but got {request.tokens}")
    documents = {path: list(token_documents(path, read_documents(path), tokenizer)) for path in kinds}
    if generated is not None:
        documents = {generated.path: list(generated.documents), **documents}
        kinds = {**kinds, generated.path: GENERATED}
        source = f"{source} and {GENERATED}"
    files = [_File(path, each, seed, kinds[path]) for path, each in documents.items()]
    digest = files_sha256(documents)
    found = [_draw(files, request) for request in requests]
    drawn = [tuple(window for _, window in each) for each in found]
    if any(_tokens(windows) < request.tokens for windows, request in zip(drawn, requests, strict=True)):
        held, wanted = sum(map(_tokens, drawn)), sum(request.tokens for request in requests)
        names = " + ".join(request.name for request in requests)
        raise ValueError(f"{source}: {names} must be at most the {held:,} that the text holds, but got {wanted:,}")
    return [
        CalibrationText(source, digest, windows, tuple(kind for kind, _ in each))
        for windows, each in zip(drawn, found, strict=True)
    ]


def _row(record: Any) -> tuple[int, ...]:
    ids = record.get("ids") if isinstance(record, dict) else None
    if not isinstance(ids, list) or not ids or not all(isinstance(each, int) for each in ids):
        raise ValueError(f"each line must be an object with ids, a list of token ids, but got {show(record)}")
    return tuple(ids)


def files_sha256(paths: Iterable[Path]) -> str:
    """Digest of all bytes of some files, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


Windows = tuple[tuple[int, ...], ...]


def _tokens(windows: Windows) -> int:
    return sum(map(len, windows))


def _draw(files: "Sequence[_File]", request: TextRequest) -> list[tuple[str, tuple[int, ...]]]:
    """Windows of a request and their kinds, from each file as many tokens as from the others while it has any."""
    windows: list[tuple[str, tuple[int, ...]]] = []
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
            windows.append((file.kind, window))
            taken[file] += len(window)
            total += len(window)

    if request.long_context > request.context:
        count = request.tokens // 2 // request.long_context
        take(request.long_context, count * request.long_context, only_whole=True)
    take(request.context, request.tokens - sum(taken.values()), only_whole=False)
    return windows


class _File:
    """Documents of a file as tokens, from which windows are taken."""

    def __init__(self, path: Path, documents: list[DocumentTokens], seed: int, kind: str) -> None:
        self.kind = kind
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
