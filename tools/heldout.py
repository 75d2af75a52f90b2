"""Held-out text as token windows for teacher-forced evaluation."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration.calibration_text import (
    HELDOUT,
    TextRequest,
    draw_heldout,
    files_sha256,
    heldout_paths,
)
from kvtuner_tools.data_files import DocumentTokens, file_sha256, read_documents, token_documents

logger = logging.getLogger("kvtuner")


def identity(path: Path | None) -> dict[str, str]:
    """What results say of a text: its file and its digest."""
    if path is None:
        return {"file": HELDOUT, "sha256": files_sha256(heldout_paths())}
    return {"file": path.name, "sha256": file_sha256(path)}


def load_windows(path: Path | None, tokenizer: Any, *, tokens: int, context: int) -> list[list[int]]:
    """Token windows of at most ``context`` tokens, as many as hold ``tokens`` tokens together, in file order.

    Without a file, it is a mixture of the bundled held-out set: a novel, code and conversations in equal shares, of
    which calibration draws nothing. Windows are then full, and shorter documents joined in them.

    A text, which is the file or a row of JSON in it, becomes contiguous windows of ``context`` tokens and a shorter one
    at its end, each beginning with the BOS token where the tokenizer adds one. A conversation is one window in the
    model's chat template. It is logged how many of them are cut at ``context``, and how many windows are left out since
    they are too short to predict anything.

    Raises:
        ProfileError: the file cannot be read, or every row in it that cannot be used, with file and line.
        ValueError: a window too short to predict anything, or too little text.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, but got {context}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, but got {tokens}")
    if path is None:
        return list(map(list, draw_heldout(tokenizer, TextRequest(tokens, context, name="--tokens")).windows))
    windows: list[list[int]] = []
    total = cut = short = 0
    for document in token_documents(path, read_documents(path), tokenizer):
        cut += document.is_conversation and len(document.prefix) + len(document.ids) > context
        for window in _windows(document, context):
            if len(window) < 2:
                short += 1
            elif total < tokens:
                windows.append(window)
                total += len(window)
        if total >= tokens:
            break
    if cut:
        logger.warning("%s: of %d windows, %d are conversations cut at %d tokens", path, len(windows), cut, context)
    if short:
        logger.warning("%s: %d windows of one token, which predict nothing, were left out", path, short)
    if total < tokens:
        raise ValueError(f"{path}: must hold {tokens} tokens in windows of {context}, but got {total}")
    return windows


def _windows(document: DocumentTokens, context: int) -> Iterator[list[int]]:
    step = context - len(document.prefix)
    count = 1 if document.is_conversation else len(document.ids)
    for start in range(0, count, step):
        yield [*document.prefix, *document.ids[start : start + step]]
