"""Held-out text as token windows for teacher-forced evaluation."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load_windows(path: Path, tokenizer: Any, *, tokens: int, context: int) -> list[list[int]]:
    """Token windows of at most ``context`` tokens, as many as hold ``tokens`` tokens together, in file order.

    Plain text becomes contiguous windows of exactly ``context`` tokens, each beginning with the BOS token where the
    tokenizer adds one. A ``.jsonl`` file has ``question`` and ``answer`` per line: each line is one chat in the
    model's chat template and one window, cut at ``context``.

    Raises:
        ValueError: a window too short to predict anything, too little text, a line without the two fields, or chats
            for a tokenizer without a chat template.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, but got {context}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, but got {tokens}")
    source = _chats(path, tokenizer) if path.suffix == ".jsonl" else _text(path, tokenizer, context)
    windows: list[list[int]] = []
    total = 0
    for window in source:
        windows.append(window[:context])
        total += len(windows[-1])
        if total >= tokens:
            return windows
    raise ValueError(f"{path}: must hold {tokens} tokens in windows of {context}, but got {total}")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text(path: Path, tokenizer: Any, context: int) -> Iterator[list[int]]:
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
    step = context - len(prefix)
    for start in range(0, len(ids) - step + 1, step):
        yield prefix + ids[start : start + step]


def _chats(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: chats need a tokenizer with a chat template, but {tokenizer.name_or_path} has none")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
            raise ValueError(f"{path}:{number}: each line must be an object with question and answer, but got {line!r}")
        chat = [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["answer"]},
        ]
        # The template writes the special tokens itself, so the tokenizer must not add them again.
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        yield tokenizer(text, add_special_tokens=False)["input_ids"]
