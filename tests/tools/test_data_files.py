"""One reader for all commands' data files: what is rows and what is prose, and rows that cannot be used."""

import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtuner_tools.calibration.calibration_text import load_text
from kvtuner_tools.data_files import MAX_NAMED, read_documents
from kvtuner_tools.evaluate import _has_questions
from kvtuner_tools.heldout import load_windows
from kvtuner_tools.task_accuracy import load_task
from tests.helpers.tiny_model import make_tokenizer
from vllm_kvtuner.profile.problems import ProfileError

TOKENIZER = make_tokenizer()
QUESTION = {"question": "What is one and one? " * 8, "answer": "One and one is two. #### 2"}
CHAT = [{"role": "user", "content": QUESTION["question"]}, {"role": "assistant", "content": QUESTION["answer"]}]
ROW = json.dumps(QUESTION)
MARKED = json.dumps({**QUESTION, "answer": "Two.\u2028\x85 #### 2"}, ensure_ascii=False)
READERS = {
    "calibrate --data": lambda path: load_text(path, TOKENIZER, tokens=300, context=256, seed=0),
    "evaluate --data": lambda path: load_windows(path, TOKENIZER, tokens=300, context=256),
    "evaluate --tasks": lambda path: load_task(path, TOKENIZER, limit=2),
}
FILES = {
    "byte order mark": ("\ufeff" + ROW + "\n" + ROW).encode(),
    "UTF-16": (ROW + "\r\n" + ROW).encode("utf-16"),
    "empty lines": ("\n" + ROW + "\n \n" + ROW + "\n\n").encode(),
    "CRLF": (ROW + "\r\n" + ROW + "\r\n").encode(),
    "CR": (ROW + "\r" + ROW).encode(),
    "other ends of lines in a string": (MARKED + "\n" + ROW).encode(),
    "both halves of a pair": ROW.replace("one?", "\\ud83d\\ude00").encode() + b"\n" + ROW.encode(),
    "a list": json.dumps([QUESTION, QUESTION], indent=1).encode(),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSONL", "rows.json", "rows.txt", "rows"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_all_commands_read_the_same_files_whatever_their_names(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert [len(document) for _, document in read_documents(path)] == [2, 2]
    for read in READERS.values():
        read(path)
    assert _has_questions(str(path))


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", '{"text": "a"}\nno row\n{"text": "b"}', None),
        ("a.txt", 'Rows look so:\n{"text": "a"}\nand so on.\nThe end.', "prose"),
        ("a.txt", '{ "text": 1 }, they said\nand more', "prose"),
        ("a.txt", "[1, 2]\n[3]", "prose"),
        ("a.json", '\n\n{\n "text": "a"\n}', [(3, "a")]),
        ("a.json", '[\n{"text": "a"},\n\n {"text":\n"b"},{"text": "c"}]', [(2, "a"), (4, "b"), (5, "c")]),
        ("a.json", "prose", None),
    ],
)
def test_content_decides(tmp_path: Path, name: str, content: str, documents: object) -> None:
    path = tmp_path / name
    path.write_text(content)
    if documents is None:
        with pytest.raises(ProfileError, match=f"{path}:[12]: the line must be JSON"):
            read_documents(path)
    else:
        assert read_documents(path) == ([(1, content)] if documents == "prose" else documents)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("row", "got"),
    [
        (ROW.replace("one?", "\\ud83d"), "half of a surrogate pair, at character 16"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        (ROW[:-2], "Unterminated string"),
    ],
    ids=["surrogate", "nested", "digits", "cut"],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, reader, row: str, got: str) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(f"{ROW}\n\n{ROW}\n{row}")
    with pytest.raises(ProfileError, match=rf"^{path}:4: .*{got}"):
        reader(path)


def test_half_a_pair_in_a_field_that_is_not_used_is_none_of_our_business(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "title": "\\ud83d"}')
    assert read_documents(path) == [(1, "a")]


def test_of_many_rows_some_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * (MAX_NAMED + 7))
    with pytest.raises(ProfileError) as caught:
        read_documents(path)
    assert len(caught.value.problems) == MAX_NAMED + 1
    assert caught.value.problems[-1] == f"{path}: each row must be one that can be used, but got 7 more"


def test_long_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{**QUESTION, "question": "x" * 900}, {"text": "y" * 120}, {"messages": CHAT}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        windows = load_windows(path, TOKENIZER, tokens=320, context=100)
    assert [len(window) for window in windows] == [100, 100, 22, 100]
    assert "of 4 windows, 2 are conversations cut at 100 tokens" in caplog.text

    path.write_text(f"{ROW}\n{json.dumps(rows[0])}")
    with pytest.raises(ProfileError, match=rf"^{path}:2: .* fewer tokens than the model's 1,000 positions, but got 1,"):
        load_task(path, TOKENIZER, max_tokens=50, positions=1000)


def test_a_template_that_fails_in_its_own_way_names_the_row(tmp_path: Path) -> None:
    odd = make_tokenizer()
    odd.chat_template = "{{ messages[0]['content'] + 1 }}"
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{ROW}")
    for read in (
        lambda: load_windows(path, odd, tokens=9, context=9),
        lambda: load_text(path, odd, tokens=9, context=32, seed=0),
    ):
        with pytest.raises(ProfileError, match=rf"^{path}:2: the conversation must fit the model's chat template"):
            read()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "messages", "question", "answer", "role", "content", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
LINES = st.lists(JSON.map(json.dumps) | st.text(max_size=20) | st.just(ROW), max_size=6)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    content=LINES.flatmap(
        lambda lines: st.sampled_from(["\n", "\r\n", "\r", ","]).map(lambda end: end.join(lines))
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=60),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows"]),
)
@example(content=b"\xff\xfe\x00", name="rows")
@example(content=b"[{}", name="rows.json")
def test_any_file_is_read_or_refused_with_its_name(content: bytes, name: str) -> None:
    """Commands print ValueErrors; any other exception, or one that does not name the file, is a bug."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in READERS.values():
            lines = []
            try:
                read(path)
            except ValueError as error:
                lines = str(error).split("\n")
            assert all(line.startswith(str(path)) for line in lines)
