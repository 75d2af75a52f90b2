"""Windows of held-out text."""

import json
from pathlib import Path

import pytest

from kvtuner_tools import heldout
from tests.helpers.tiny_model import make_tokenizer

VOCABULARY = 37


def test_text_windows_are_contiguous_and_begin_with_bos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = "".join(chr(97 + index % 26) for index in range(200))
    path = tmp_path / "text.txt"
    path.write_text(text)

    windows = heldout.load_windows(path, tokenizer, tokens=130, context=50)

    assert [len(window) for window in windows] == [50, 50, 50]
    assert {window[0] for window in windows} == {tokenizer.bos_token_id}
    assert tokenizer.decode([token for window in windows for token in window[1:]]) == text[:147]


def test_text_windows_have_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 10)

    windows = heldout.load_windows(path, tokenizer, tokens=20, context=10)

    assert [tokenizer.decode(window) for window in windows] == ["abcdefghab", "cdefghabcd"]


def test_chat_windows_follow_the_chat_template_and_are_cut(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"question": "1+1?", "answer": "2"})
        + "\n"
        + json.dumps({"question": "x" * 50, "answer": "y"})
        + "\n"
    )

    windows = heldout.load_windows(path, tokenizer, tokens=20, context=30)

    assert tokenizer.decode(windows[0]) == "<|user|>1+1?<|end|><|assistant|>2<|end|>"
    assert tokenizer.decode(windows[1]) == "<|user|>" + "x" * 29


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "abc", r"short\.txt: must hold 100 tokens in windows of 10, but got 4"),
        (
            "c.jsonl",
            '{"question": "q"}\n',
            r"c\.jsonl:1: the line must be an object of the form .*, but got \{'question': 'q'\}",
        ),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        heldout.load_windows(tmp_path / name, make_tokenizer(), tokens=100, context=10)
