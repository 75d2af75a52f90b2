"""Data files that users give, read alike by every command: plain text, or rows of JSON.

What a file holds decides, and not its name: rows are lines with one JSON object each, or a JSON list of objects. A name
that promises JSON only keeps a broken file from being taken for prose. A byte order mark, empty lines and any ends of
lines are read over; U+2028 and its like are characters of a string, and no ends of lines.
"""

import codecs
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from vllm_kvtuner.profile.problems import ProfileError, show

PROMISE_JSON = (".jsonl", ".ndjson", ".json")
"""Ends of names, in any case, of files that are never prose."""
MAX_NAMED = 20
"""Rows of a file that are named where they cannot be used; the others are counted."""

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_FORMS = '{"messages": [...]}, {"prompt", "response"}, {"question", "answer"} or {"text"}'
_TURNS = (("prompt", "response"), ("question", "answer"))
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a chat template may raise of messages that it was not written for."""

logger = logging.getLogger("kvtuner")

Row = TypeVar("Row")
Rows = list[tuple[int, Row]]
"""Rows with the lines at which they begin, from 1."""
Document = str | list[dict[str, str]]
"""Plain text, or the messages of a conversation."""
Documents = Rows[Document]


@dataclass(frozen=True)
class DocumentTokens:
    """A document, or a part of one.

    Args:
        prefix: what a window that begins with it begins with.
        ids: token ids.
        is_conversation: in a chat template, whose beginning a part of it would lack.
    """

    prefix: tuple[int, ...]
    ids: tuple[int, ...]
    is_conversation: bool = False


def read_documents(path: Path) -> Documents:
    """All documents of a file, in order: one of plain text, or one of each row.

    Raises:
        ProfileError: everything that is wrong with the file, with line numbers.
    """
    found = read_data(path, _document)
    if isinstance(found, str):
        return [(1, found)]
    if not found:
        raise ProfileError([f"{path}: the file must hold a line of {_FORMS}, but got none"])
    return found


def read_data(path: Path, convert: Callable[[Any], Row]) -> str | Rows[Row]:
    """A file's text, or its rows.

    Args:
        path: the file.
        convert: makes of a row's JSON what is wanted; its ValueError says ``<rule>, but got <value>``.

    Raises:
        ProfileError: no text, or every row that cannot be used, with file and line.
    """
    text = _read_text(path)
    promised = path.suffix.lower() in PROMISE_JSON
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    objects = sum(line.lstrip().startswith("{") and _is_object(line) for _, line in lines)
    if not lines and not promised:
        raise ProfileError([f"{path}: the file must hold text, but got none"])
    if 2 * objects < len(lines):
        if (rows := _document_rows(text)) is not None:
            return _converted(path, [(line, functools.partial(_given, value)) for line, value in rows], convert)
        if not promised:
            return text
    return _converted(path, [(number, functools.partial(_load, line)) for number, line in lines], convert)


def usable_text(key: str, value: Any) -> str:
    """A row's text, if a tokenizer takes it.

    Raises:
        ValueError: no text, an empty one, or one with half of a surrogate pair, which JSON can write and no tokenizer
            reads: the rest of an emoji that was cut.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be text, but got {show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"{value[error.start]!a}, half of a surrogate pair, at character {error.start}"
        raise ValueError(f"{key} must be Unicode text, but got {got}") from None
    return value


def token_documents(path: Path, documents: Documents, tokenizer: Any) -> Iterator[DocumentTokens]:
    """The documents that have tokens: conversations in the model's chat template, or as text where it has none.

    Raises:
        ProfileError: every conversation that the chat template refuses, with file and line.
    """
    bos = tokenizer.bos_token_id
    prefix = (bos,) if bos is not None and tokenizer("a")["input_ids"][0] == bos else ()
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
            except _TEMPLATE_ERRORS as error:
                problems.append(f"{path}:{line}: the conversation must fit the model's chat template, but got {error}")
                continue
            begin = ()  # the template writes the special tokens itself
        if ids := tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]):
            # Within a window, where documents are joined, the token that begins texts would draw attention.
            begin, ids = ((bos,), ids[1:]) if ids[0] == bos else (begin, ids)
            yield DocumentTokens(begin, ids, not isinstance(document, str))
    refuse_rows(path, problems)


def refuse_rows(path: Path, problems: list[str]) -> None:
    """Raise a ProfileError of rows that cannot be used, if there are any; of many, the first, and how many more."""
    if more := len(problems[MAX_NAMED:]):
        problems = [*problems[:MAX_NAMED], f"{path}: each row must be one that can be used, but got {more:,} more"]
    if problems:
        raise ProfileError(problems)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    """The text of a file, its ends of lines as ``\\n``."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ProfileError([f"{path}: the file must be readable, but got {error.strerror}"]) from None
    codec = next((codec for mark, codec in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        # The codec's offset is behind a mark that it takes off.
        start = error.start + (len(codecs.BOM_UTF8) if codec == "utf-8-sig" else 0)
        name = "UTF-16" if codec == "utf-16" else "UTF-8"
        line = content.count(b"\n", 0, start) + 1
        got = f"byte {content[start]:#x} at offset {start}, line {line}"
        raise ProfileError([f"{path}: the file must be {name} text, but got {got}"]) from None
    return re.sub(r"\r\n?", "\n", text)


def _load(text: str) -> Any:
    """JSON; ValueError says ``<rule>, but got <value>``."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"the line must be JSON, but got {error}") from None
    except RecursionError:
        raise ValueError("the line must be JSON that can be read, but got brackets nested too deeply") from None


def _given(value: Any) -> Any:
    return value


def _is_object(line: str) -> bool:
    try:
        return isinstance(_load(line), dict)
    except ValueError:
        return False


def _document_rows(text: str) -> Rows[Any] | None:
    """Rows of a file that is one JSON document: an object, or a list that holds one; None for any other file."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        whole = _load(text)
    except ValueError:
        return None
    if isinstance(whole, dict):
        return [(text[: text.index("{")].count("\n") + 1, whole)]
    if not any(isinstance(each, dict) for each in whole):
        return None
    decoder, rows = json.JSONDecoder(), []
    line, place, end = 1, 0, text.index("[") + 1
    while (match := re.compile(r"[\s,]*(?=[^\s,\]])").match(text, end)) is not None:
        line += text.count("\n", place, match.end())
        place = match.end()
        value, end = decoder.raw_decode(text, place)
        rows.append((line, value))
    return rows


def _converted(path: Path, rows: list[tuple[int, Callable[[], Any]]], convert: Callable[[Any], Row]) -> Rows[Row]:
    found, problems = [], []
    for line, load in rows:
        try:
            found.append((line, convert(load())))
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
    refuse_rows(path, problems)
    return found


def _document(record: Any) -> Document:
    if isinstance(record, Mapping):
        if "messages" in record:
            return _messages(record["messages"])
        for keys in _TURNS:
            if all(key in record for key in keys):
                turns = zip(("user", "assistant"), keys, strict=True)
                return [{"role": role, "content": usable_text(key, record[key])} for role, key in turns]
        if "text" in record:
            return usable_text("text", record["text"])
    raise ValueError(f"the line must be an object of the form {_FORMS}, but got {show(record)}")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list of at least one message, but got {show(value)}")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"messages[{index}] must have role and content as text, but got {show(message)}")
        for key in ("role", "content"):
            if message[key].strip():  # an empty message is one: a turn of a tool, a system prompt left out
                usable_text(f"messages[{index}].{key}", message[key])
    return [{"role": message["role"], "content": message["content"]} for message in value]
