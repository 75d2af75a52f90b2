"""Calibration text: forms of data files, windows and their drawing, and everything that can be wrong with a file."""

import json
import re
from pathlib import Path

import pytest

from kvtuner_tools.calibration import calibration_text
from kvtuner_tools.calibration.calibration_text import (
    BUNDLED_FILES,
    TextRequest,
    draw_texts,
    load_text,
)
from kvtuner_tools.data_files import read_documents
from tests.helpers.tiny_model import make_tokenizer
from vllm_kvtuner.profile.problems import ProfileError

BOS = 256
DATA = Path(calibration_text.__file__).parent / "data"
LONG = "Every word of this sentence is one that the tokenizer takes apart into bytes. "


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def load(path, tokenizer, tokens=64, context=64, seed=0):
    return load_text(path, tokenizer, tokens=tokens, context=context, seed=seed)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_each_form_becomes_the_same_conversation_or_text(tmp_path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    records = [
        {"messages": messages},
        {"prompt": "Q", "response": "A"},
        {"question": "Q", "answer": "A", "level": 3},
        {"text": "T"},
    ]
    path = write_lines(tmp_path / "d.jsonl", records)
    assert read_documents(path) == [(1, messages), (2, messages), (3, messages), (4, "T")]


def test_empty_lines_keep_the_numbers_of_the_others(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert read_documents(path) == [(2, "a"), (4, "b")]


def test_all_bad_lines_are_reported_with_file_and_line(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        '{"text": "fine"}',
        "{",
        '["text"]',
        '{"question": "no answer"}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": 3}]}',
        '{"prompt": "p", "response": " "}',
        '{"text": 7}',
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(ProfileError) as caught:
        read_documents(path)
    forms = '{"messages": [...]}, {"prompt", "response"}, {"question", "answer"} or {"text"}'
    problems = [line.removeprefix(f"{path}:") for line in caught.value.problems]
    assert problems[0].startswith("2: the line must be JSON, but got ")
    assert problems[1:] == [
        f"3: the line must be an object of the form {forms}, but got ['text']",
        f"4: the line must be an object of the form {forms}, but got {{'question': 'no answer'}}",
        "5: messages must be a list of at least one message, but got []",
        "6: messages[0] must have role and content as text, but got {'role': 'user', 'content': 3}",
        "7: response must be text, but got ' '",
        "8: text must be text, but got 7",
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.txt", b" \n", "the file must hold text, but got none"),
        ("d.jsonl", b"\n", "the file must hold a line of"),
        ("d.txt", b"ab\xff", "the file must be UTF-8 text, but got byte 0xff at offset 2"),
        ("d.txt", None, "the file must be readable, but got No such file or directory"),
    ],
)
def test_files_without_text(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_text_is_cut_into_windows_with_bos(tmp_path, tokenizer):
    written = "".join(f"{number:04}" for number in range(63 * 4))
    path = tmp_path / "d.txt"
    path.write_text(written)
    text = load(path, tokenizer, tokens=16 * 64)
    assert all(window[0] == BOS and len(window) == 64 for window in text.windows)
    places = sorted(written.index(tokenizer.decode(window[1:])) for window in text.windows)
    assert places == list(range(0, len(written), 63))
    assert text.tokens == 16 * 64 and text.source == str(path)


def test_conversations_take_the_chat_template(tmp_path, tokenizer):
    path = write_lines(tmp_path / "d.jsonl", [{"question": LONG, "answer": LONG}])
    (window, *_) = load(path, tokenizer, tokens=150, context=512).windows
    assert tokenizer.decode(window) == f"<|user|>{LONG}<|end|><|assistant|>{LONG}<|end|>"


def test_without_a_template_conversations_are_text_and_that_is_logged(tmp_path, caplog):
    plain = make_tokenizer()
    plain.chat_template = None
    path = write_lines(tmp_path / "d.jsonl", [{"question": LONG, "answer": "Yes."}])
    (window,) = load(path, plain, tokens=50, context=512).windows
    assert plain.decode(window) == f"<bos>{LONG}\n\nYes."
    assert "no chat template" in caplog.text


def test_conversations_that_the_template_refuses_are_all_reported(tmp_path):
    strict = make_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    system = {"messages": [{"role": "system", "content": LONG}]}
    path = write_lines(tmp_path / "d.jsonl", [system, {"text": LONG}, system])
    with pytest.raises(ProfileError) as caught:
        load(path, strict)
    assert caught.value.problems == tuple(
        f"{path}:{line}: the conversation must fit the model's chat template, but got no system role" for line in (1, 3)
    )


def test_the_seed_draws_the_windows(tmp_path, tokenizer):
    path = write_lines(tmp_path / "d.jsonl", [{"text": f"{number:03} {LONG}"} for number in range(40)])
    first, again, other = (load(path, tokenizer, tokens=300, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.windows != other.windows and first.sha256 == other.sha256


def test_too_little_text(tmp_path, tokenizer):
    path = write_lines(tmp_path / "d.jsonl", [{"text": "short"}, {"text": LONG[:50]}])
    rule = "tokens must be at most the 56 that the text holds, but got 1,000"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {rule}')}$"):
        load(path, tokenizer, tokens=1000)
    requests = [TextRequest(48, 48, name="--first"), TextRequest(500, 48, name="--second")]
    rule = "--first + --second must be at most the 48 that the text holds, but got 548"
    with pytest.raises(ValueError, match=re.escape(rule)):
        draw_texts(path, tokenizer, requests, seed=0)


def test_short_documents_are_joined_until_they_fill_a_window(tmp_path, tokenizer):
    lines = [f"{number:03} is a short line of text. " for number in range(60)]
    path = write_lines(tmp_path / "d.jsonl", [{"text": line} for line in lines])
    windows = load(path, tokenizer, tokens=1024, context=128).windows
    assert len(windows) == 8 and {len(window) for window in windows} == {128}
    together = "".join(tokenizer.decode(window[1:]) for window in windows)
    assert all(window[0] == BOS for window in windows)
    assert sum(line in together for line in lines) >= 34


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_are_apart_as_long_as_asked_and_do_not_know_the_later_ones(tmp_path, tokenizer, seed):
    words = [f"{number:05}" for number in range(4000)]
    path = write_lines(
        tmp_path / "d.jsonl",
        [{"text": "".join(words[:2000])}, *({"text": "".join(words[at : at + 10])} for at in range(2000, 4000, 10))],
    )
    requests = [TextRequest(2048, 256), TextRequest(512, 64), TextRequest(1024, 256)]
    texts = draw_texts(path, tokenizer, requests, seed=seed)
    assert [text.tokens for text in texts] == [2048, 512, 1024]
    tokens = [tokenizer.decode(window[1:]) for text in texts for window in text.windows]
    pieces = [piece for window in tokens for piece in (window[at : at + 30] for at in range(0, len(window) - 30, 30))]
    assert len(pieces) == len(set(pieces))
    first, second, _ = texts
    for later in (TextRequest(64, 64), TextRequest(2048, 512)):
        assert draw_texts(path, tokenizer, [*requests[:2], later], seed=seed)[:2] == [first, second]


def test_half_of_a_text_has_longer_windows_where_documents_are_long_enough(tmp_path, tokenizer):
    long = "".join(f"{number:04}" for number in range(1000))
    path = write_lines(tmp_path / "d.jsonl", [{"text": long}, *({"text": LONG} for _ in range(100))])
    (text,) = draw_texts(path, tokenizer, [TextRequest(4096, 128, 1024)], seed=0)
    lengths = [len(window) for window in text.windows]
    assert lengths == [1024, 1024] + [128] * 16
    assert all(tokenizer.decode(window[1:]) in long for window in text.windows[:2])
    (text,) = draw_texts(path, tokenizer, [TextRequest(4096, 128, 8192)], seed=0)
    assert {len(window) for window in text.windows} == {128}
    assert text.identity | {"sha256": ""} == {
        "source": str(path), "sha256": "", "tokens": 4096, "windows": 32, "longest": 128,
    }  # fmt: skip


@pytest.mark.slow
def test_the_bundled_set_gives_equal_shares_of_its_kinds(tokenizer):
    text = load(None, tokenizer, tokens=20 * 2048, context=2048)
    assert text.source == "bundled" and text.tokens == 20 * 2048
    assert {len(window) for window in text.windows} == {2048}
    decoded = [tokenizer.decode(window) for window in text.windows]
    assert sum("<|user|>" in each for each in decoded) >= 4
    sources = [(DATA / name).read_text() for name in ("prose.txt", "novel.txt")]
    assert [sum(each[5:] in source for each in decoded) for source in sources] == [4, 4]


def test_the_bundled_set_holds_128k_tokens_and_long_documents():
    """Words and marks, of which tokenizers make no fewer tokens."""
    sizes = [
        len(re.findall(r"\w+|[^\w\s]", document if isinstance(document, str) else document[-1]["content"]))
        for name in BUNDLED_FILES
        for _, document in read_documents(DATA / name)
    ]
    assert sum(sizes) >= 128_000
    assert sum(size // 8192 for size in sizes) >= 6
