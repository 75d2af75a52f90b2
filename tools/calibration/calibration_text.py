"""Calibration text as token windows: the bundled set, plain text, or jsonl with one conversation or text per line."""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vllm_kvtuner.profile.problems import ProfileError, show

BUNDLED = "bundled"
"""Source of the set that ships with this package."""
MIN_WINDOW = 32
"""Tokens below which the rest of a document is dropped."""

_BUNDLED_FILES = ("prose.txt", "conversations.jsonl")
_FORMS = '{"messages": [...]}, {"prompt", "response"}, {"question", "answer"} or {"text"}'
_TURNS = (("prompt", "response"), ("question", "answer"))

logger = logging.getLogger("kvtuner")

Document = str | list[dict[str, str]]
"""Plain text, or the messages of a conversation."""
Documents = list[tuple[int, Document]]
"""Documents with the lines at which they begin, from 1."""


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
        """What artifacts say of it: source, sha256 and tokens."""
        return {"source": self.source, "sha256": self.sha256, "tokens": self.tokens}


def load_text(data: Path | None, tokenizer: Any, *, tokens: int, context: int, seed: int) -> CalibrationText:
    """Windows of at most ``context`` tokens, drawn at random without replacement until they hold ``tokens`` together.

    A plain text file is one document, a line of a ``.jsonl`` file another: a conversation in the model's chat template
    (its contents one below the other where the tokenizer has none, which is logged) or a text. Documents longer than
    ``context`` become several windows. The bundled set gives half of the tokens as prose and half as conversations.

    Args:
        data: the file; None takes the bundled set.
        tokenizer: transformers tokenizer of the model.
        tokens: tokens wanted, at least.
        context: tokens of a window at most.
        seed: of the drawing.

    Raises:
        ProfileError: the file cannot be read, or every line in it that is of no known form, with file and line.
        ValueError: too little text, or numbers out of range.
    """
    if context < MIN_WINDOW:
        raise ValueError(f"context must be at least {MIN_WINDOW} tokens, but got {context}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, but got {tokens}")
    folder = Path(__file__).parent / "data"
    paths = [data] if data is not None else [folder / name for name in _BUNDLED_FILES]
    digest = hashlib.sha256()
    windows: list[tuple[int, ...]] = []
    for path in paths:
        documents = read_documents(path)
        digest.update(path.read_bytes())
        candidates = list(_windows(path, documents, tokenizer, context))
        random.Random(f"{seed} {path.name}").shuffle(candidates)
        windows += _take(path, candidates, -(-tokens // len(paths)))
    return CalibrationText(BUNDLED if data is None else str(data), digest.hexdigest(), tuple(windows))


def read_documents(path: Path) -> Documents:
    """All documents of a file with their lines, in order; empty lines of a ``.jsonl`` file are skipped.

    Raises:
        ProfileError: everything that is wrong with the file, with line numbers.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ProfileError([f"{path}: the file must be readable, but got {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at offset {error.start}"
        raise ProfileError([f"{path}: the file must be UTF-8 text, but got {got}"]) from None
    if path.suffix != ".jsonl":
        if not text.strip():
            raise ProfileError([f"{path}: the file must hold text, but got none"])
        return [(1, text)]
    documents: Documents = []
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append((number, _document(line)))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise ProfileError(problems)
    if not documents:
        raise ProfileError([f"{path}: the file must hold a line of {_FORMS}, but got none"])
    return documents


def _document(line: str) -> Document:
    """One line of a jsonl file; ValueError says ``<rule>, but got <value>``."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"the line must be JSON, but got {error}") from None
    if isinstance(record, Mapping):
        if "messages" in record:
            return _messages(record["messages"])
        for keys in _TURNS:
            if all(key in record for key in keys):
                turns = zip(("user", "assistant"), keys, strict=True)
                return [{"role": role, "content": _text(key, record[key])} for role, key in turns]
        if "text" in record:
            return _text("text", record["text"])
    raise ValueError(f"the line must be an object of the form {_FORMS}, but got {show(record)}")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list of at least one message, but got {show(value)}")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"messages[{index}] must have role and content as text, but got {show(message)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be text, but got {show(value)}")
    return value


def _windows(path: Path, documents: Documents, tokenizer: Any, context: int) -> Iterator[tuple[int, ...]]:
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
    if not tokenizer.chat_template and any(isinstance(document, list) for _, document in documents):
        logger.warning("%s: the tokenizer has no chat template; conversations are run as plain text", path)
    problems = []
    for line, document in documents:
        begin = prefix
        if isinstance(document, str):
            text = document
        elif not tokenizer.chat_template:
            text = "\n\n".join(message["content"] for message in document)
        else:
            try:
                text = tokenizer.apply_chat_template(document, tokenize=False)
            except jinja2.TemplateError as error:
                problems.append(f"{path}:{line}: the conversation must fit the model's chat template, but got {error}")
                continue
            begin = []  # the template writes the special tokens itself
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = context - len(begin)
        for start in range(0, len(ids), step):
            if len(window := begin + ids[start : start + step]) >= MIN_WINDOW:
                yield tuple(window)
    if problems:
        raise ProfileError(problems)


def _take(path: Path, candidates: list[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    taken: list[tuple[int, ...]] = []
    total = 0
    for window in candidates:
        taken.append(window)
        total += len(window)
        if total >= tokens:
            return taken
    rule = f"must hold {tokens} tokens in documents of at least {MIN_WINDOW}"
    raise ValueError(f"{path}: {rule}, but got {total}")
