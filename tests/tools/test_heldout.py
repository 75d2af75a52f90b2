"""Windows of held-out text."""

import json
from pathlib import Path

import pytest

from kvtuner_tools import heldout
from kvtuner_tools.calibration import calibration_text
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


@pytest.mark.slow
def test_without_a_file_kinds_of_text_have_equal_shares_and_are_the_same_each_time() -> None:
    tokenizer = make_tokenizer()

    windows = heldout.load_windows(None, tokenizer, tokens=6 * 1024, context=1024)

    assert [len(window) for window in windows] == [1024] * 6
    assert windows == heldout.load_windows(None, tokenizer, tokens=6 * 1024, context=1024)
    decoded = [tokenizer.decode(window) for window in windows]
    assert sum("<|user|>" in window for window in decoded) == 2
    novel = (calibration_text.heldout_paths()[0]).read_text(encoding="utf-8")
    assert sum(window[-100:] in novel for window in decoded) == 2
    assert heldout.identity(None)["file"] == "bundled held-out text"


def test_more_than_the_bundled_text_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--tokens must be at most the [0-9,]+ that .* holds, but got 9,000,000"):
        heldout.load_windows(None, make_tokenizer(), tokens=9_000_000, context=1024)


SHARED_PHRASES = 10
"""Eight words in a row that unlike texts share: a list of the numbers to nine, or how modules import a C version."""


def test_calibration_draws_nothing_of_the_bundled_held_out_text() -> None:
    def phrases(paths: list[Path]) -> set[tuple[str, ...]]:
        texts = (path.read_text(encoding="utf-8").replace("\\n", " ").split() for path in paths)
        return {tuple(words[index : index + 8]) for words in texts for index in range(len(words) - 7)}

    held = calibration_text.heldout_paths()
    drawn = [held[0].parent / name for name in calibration_text.BUNDLED_FILES]
    assert len(phrases(held) & phrases(drawn)) <= SHARED_PHRASES
