"""Plain English, as far as it can be counted: short sentences, few numbers in each, narrow lines, no riddles."""

import re
from pathlib import Path

import pytest

from tests.helpers import markdown
from tests.helpers.markdown import ROOT

README_LINES = 110
LINE_WIDTH = 100
WORDS = 25
"""Of a sentence, at most; inline code is one word, and a colon ends a sentence."""
NUMBERS = 2
"""Of a sentence, at most; dates, versions and names such as Llama-3.1-8B do not count."""

PAGES = [page for page in markdown.pages() if page != markdown.GENERATED and page.name != "CHANGELOG.md"]

_WORD = re.compile(r"\w")
_NO_NUMBER = re.compile(r"\d{4}-\d\d-\d\d|\b\d+\.\d+\.\d+\b|[A-Za-z]+-?\d[\w.-]*|\d[\w.]*-[A-Za-z][\w.-]*")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*")
_RUN_LETTER = re.compile(r"\b[Rr]uns? (?:[b-l]\b|a\b(?=\s*[(),.;:]))|\bversion 1\d\b(?!\.)")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_sentences_are_short(page: Path):
    sentences = list(markdown.sentences(page.read_text(encoding="utf-8")))
    assert [each for each in sentences if count_words(each) > WORDS] == []


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_sentences_hold_few_numbers(page: Path):
    sentences = list(markdown.sentences(page.read_text(encoding="utf-8")))
    assert [each for each in sentences if count_numbers(each) > NUMBERS] == []


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_lines_are_narrow(page: Path):
    """Tables, code and what cannot be broken aside."""
    lines = markdown.without_fences(page.read_text(encoding="utf-8")).splitlines()
    wide = [line for line in lines if len(line) > LINE_WIDTH and not line.startswith(("|", "!["))]
    assert [line for line in wide if " " in line.strip()] == []


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_paragraphs_have_headings_and_no_bold_run_ins(page: Path):
    assert re.findall(r"^ *(?:- )?\*\*[^*]+\*\*.*", page.read_text(encoding="utf-8"), re.MULTILINE) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=markdown.name)
def test_pages_name_no_run_letters_and_no_kernel_versions(page: Path):
    text = markdown.without_fences(page.read_text(encoding="utf-8"))
    assert _RUN_LETTER.findall(re.sub(r"`[^`]*`", "", text)) == []


def count_words(sentence: str) -> int:
    return sum(1 for word in sentence.split() if _WORD.search(word))


def count_numbers(sentence: str) -> int:
    return len(_NUMBER.findall(_NO_NUMBER.sub("", sentence)))


@pytest.mark.parametrize(
    ("text", "words", "numbers"),
    [
        ("A window of 64 tokens takes `a b c` 3.0% longer.", [9], [2]),
        ("vLLM 0.33.0 serves Llama-3.1-8B since 2026-11-29, K4V2 too.", [8], [0]),
        ("- One item\n  goes on.\n- [Another one](x.md#y): 1, 2 and 3.\n", [4, 2, 4], [0, 0, 3]),
        ("# Title\n\n| a table | of 9 |\n\n```\nsome code\n```\n\nText (of 1). More.\n", [3, 1], [1, 0]),
    ],
)
def test_words_and_numbers_are_counted(text, words, numbers):
    sentences = list(markdown.sentences(text))
    assert [count_words(each) for each in sentences] == words
    assert [count_numbers(each) for each in sentences] == numbers
