"""Calibration text: forms of data files, windows and their drawing, and everything that can be wrong with a file."""

import json
import re

import pytest

from kvtuner_tools.calibration.calibration_text import MIN_WINDOW, load_text, read_documents
from tests.helpers.tiny_model import make_tokenizer
from vllm_kvtuner.profile.problems import ProfileError

BOS = 256
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
    rule = f"must hold 1000 tokens in documents of at least {MIN_WINDOW}"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {rule}, but got 51')}$"):
        load(path, tokenizer, tokens=1000)


def test_the_bundled_set_gives_prose_and_conversations(tokenizer):
    text = load(None, tokenizer, tokens=20_000, context=512)
    assert text.source == "bundled"
    begins = [tokenizer.decode(window[:1]) for window in text.windows]
    prose = sum(len(window) for window, begin in zip(text.windows, begins, strict=True) if begin == "<bos>")
    assert 10_000 <= prose < 10_600 and 20_000 <= text.tokens < 21_200
    assert "<|user|>" in begins
