"""Tables, pictures and figures in prose are what ``docs/benchmarks/data`` gives: ``make tables`` changes nothing."""

import json
from pathlib import Path

import pytest

from kvtuner_tools.bench import step_times
from kvtuner_tools.bench.tables import markdown, pictures, rows
from kvtuner_tools.bench.tables.claims import CLAIMS
from kvtuner_tools.bench.tables.published import Published, accuracy, fixed, loss, table
from kvtuner_tools.bench.tables.steps import measured_steps

ROOT = Path(__file__).parent.parent.parent
PAGES = markdown.pages(ROOT)
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "benchmarks" / "index.md"
CLAIMED = [README, *sorted((ROOT / "docs" / "benchmarks").glob("*.md"))]
"""Pages whose figures must all be generated."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def published() -> Published:
    return Published(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_say_what_the_data_say(page, published):
    text = page.read_text()
    assert markdown.rewrite(text, published, page) == text, "run make tables, and read what changed"


@pytest.mark.parametrize("page", CLAIMED, ids=name)
def test_figures_in_prose_are_claims(page):
    assert markdown.unclaimed(page.read_text()) == [], "write NUMBER<!-- claim: NAME -->, or leave the figure out"


def test_readme_has_its_table_and_a_picture():
    text = README.read_text()
    assert "<!-- generated: readme -->" in text
    assert any(f"docs/benchmarks/{picture}" in text for picture in pictures.PICTURES)


def test_pictures_show_the_data(published):
    assert list(pictures.outdated(ROOT, published)) == [], "run make tables, and look at what changed"


def test_step_times_of_the_wheel_are_the_datas(published):
    assert step_times.render(measured_steps(published)) == step_times.TABLE.read_text(), "run make tables"


def test_every_file_is_behind_a_claim(published, monkeypatch):
    read = set()
    result = Published.result

    def keep(self: Published, name: str) -> dict:
        read.add(name)
        return result(self, name)

    monkeypatch.setattr(Published, "result", keep)
    for block in markdown.BLOCKS.values():
        block(published, INDEX)
    for claim in CLAIMS.values():
        claim(published)
    read |= {name for sources in pictures.PICTURES.values() for name in sources}
    assert read == set(published.names())


def test_every_block_has_a_place():
    text = "".join(page.read_text() for page in PAGES)
    assert [block for block in markdown.BLOCKS if f"<!-- generated: {block} -->" not in text] == []


def test_data_say_when_where_and_with_what(published):
    for name in published.names():
        result = published.result(name)
        for each in result.get("evaluations", [result]):
            assert each["created"] and each["device"] and each["versions"]["vllm"], name
            assert each["created"][:10] <= published.file(name).name[:10], name


def test_a_newer_file_takes_the_place_of_the_old_one(tmp_path):
    folder = tmp_path / "docs" / "benchmarks" / "data"
    folder.mkdir(parents=True)
    for date in ("2000-01-01", "2000-01-02"):
        (folder / f"{date}_kernel_h200.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be one file, but got 2000-01-01_kernel_h200.json and 2000-01-02_"):
        Published(tmp_path).names()


def kernel_file(root: Path, name: str, *cases: dict) -> None:
    """A result of ``bench kernel`` with those decode cases."""
    common = {"shape": "32/8/128", "block_size": 16, "transforms": "none", "point": "64x8192", "failure": None}
    head = {"created": "2000-01-01T00:00:00+00:00", "device": "a card", "versions": {"vllm": "0.33.0"}}
    folder = root / "docs" / "benchmarks" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    result = {**head, "decode": [{**common, **case} for case in cases]}
    (folder / f"2000-01-01_{name}.json").write_text(json.dumps(result))


def test_query_tokens_tell_cases_apart_and_are_one_where_data_are_older(tmp_path):
    cuda = {"implementation": "cuda", "format": "K4V4"}
    kernel_file(tmp_path, "old", {**cuda, "query_tokens": 1, "us": 135.0})
    kernel_file(
        tmp_path, "new", *({**cuda, "query_tokens": tokens, "us": us} for tokens, us in (("1", 136.0), ("4", 145.0)))
    )
    published = Published(tmp_path)
    assert published.kernel("old", format="K4V4")["us"] == 135.0
    assert published.kernel("new", format="K4V4")["us"] == 136.0
    assert published.kernel("new", format="K4V4", query_tokens="4")["us"] == 145.0


def test_the_table_of_rows(tmp_path):
    kernel_file(
        tmp_path, "kernel_rows_h200",
        {"implementation": "cuda", "format": "K4V4", "query_tokens": "4", "us": 145.04, "fraction_given": 0.901},
        {"implementation": "cuda", "format": "K4V4", "query_tokens": "1", "us": 135.0, "fraction_given": 0.97},
        {"implementation": "xqa_fp8", "format": "fp8", "query_tokens": "1", "us": 316.0, "fraction_given": 0.78},
        {"implementation": "xqa_fp8", "format": "fp8", "query_tokens": "4", "failure": "RuntimeError: no"},
    )  # fmt: skip
    case = {"implementation": "fa3_fp8", "format": "fp8", "query_tokens": "1+4", "us": 109.0, "fraction_given": 0.56}
    kernel_file(tmp_path, "kernel_rows_long_h200", {**case, "shape": "64/8/128", "point": "2x131072"})

    lines = rows.kernels(Published(tmp_path), INDEX).splitlines()

    assert lines[0].startswith("| query / KV heads / head size | requests x tokens | query tokens | rows | FA3 bf16 |")
    assert lines[2:5] == [
        "| 32 / 8 / 128 | 64 x 8192 | 1 | 4 | - | - | - | 316.0 (78.0) | - | 135.0 (97.0) | - | - |",
        "| 32 / 8 / 128 | 64 x 8192 | 4 | 16 | - | - | - | - | - | 145.0 (90.1) | - | - |",
        "| 64 / 8 / 128 | 2 x 131072 | 1+4 | 32 | - | 109.0 (56.0) | - | - | - | - | - | - |",
    ]
    assert lines[-2].startswith("[2000-01-01_kernel_rows_h200.json](")
    assert lines[-1].startswith("[2000-01-01_kernel_rows_long_h200.json](")


def test_what_the_table_of_rows_cannot_take(tmp_path):
    """Two results side by side in a line, a case twice, and shares of no bandwidth."""
    case = {"implementation": "fa3_fp8", "format": "fp8", "query_tokens": "1", "us": 109.0, "fraction_given": 0.56}
    for folder, files, message in (
        ("two", {"kernel_rows_a": [case], "kernel_rows_b": [{**case, "implementation": "cuda"}]}, "in kernel_rows_a"),
        ("twice", {"kernel_rows_a": [case, case]}, "exactly once, but got it twice"),
        ("no bandwidth", {"kernel_rows_a": [{**case, "fraction_given": None}]}, "must be measured with --bandwidth"),
    ):
        for name, cases in files.items():
            kernel_file(tmp_path / folder, name, *cases)
        with pytest.raises(ValueError, match=message):
            rows.kernels(Published(tmp_path / folder), INDEX)


def test_the_table_of_speculation(tmp_path):
    def setting(label: str, rate: float | None, profile: str | None = None) -> dict:
        point = {"batch": 64, "context": 8192, "decode_ms": 20.004, "tokens_per_step": 2.533, "decode_tok_s": rate}
        loop = {**point, "prompt": 4096, "output": 512, "concurrency": 1000}
        del loop["batch"], loop["context"]
        return {"label": label, "kv_cache_dtype": label.partition("@")[0], "profile": profile,
                "points": [point], "throughput": [loop]}  # fmt: skip

    settings = [setting("auto", None), setting("fp8", 8000.0), setting("fp8@FLASHINFER", 10_000.0)]
    settings.append(setting("kvtuner:a/mine.yaml", 16_500.0, "a/mine.yaml"))
    head = {"created": "2000-01-01T00:00:00+00:00", "device": "a card", "versions": {"vllm": "0.33.0"}}
    folder = tmp_path / "docs" / "benchmarks" / "data"
    folder.mkdir(parents=True)
    (folder / "2000-01-01_serve_speculation_h200.json").write_text(
        json.dumps({**head, "model": "m:tp8", "speculate": "3:0.7", "settings": settings})
    )

    lines = rows.engines(Published(tmp_path), INDEX).splitlines()

    assert lines[2:5] == [
        "| m:tp8 | 3 | 64 x 8,192 | fp8 | 20.00 | 2.53 | 8,000 | 0.80 |",
        "| m:tp8 | 3 | 64 x 8,192 | fp8@FLASHINFER | 20.00 | 2.53 | 10,000 | 1.00 |",
        "| m:tp8 | 3 | 64 x 8,192 | kvtuner, mine | 20.00 | 2.53 | 16,500 | 1.65 |",
    ]
    assert lines[5] == "| m:tp8 | 3 | 1,000 x (4,096 + 512) | fp8 | 20.00 | 2.53 | 8,000 | 0.80 |"


def test_tables_without_a_result_say_so(tmp_path):
    assert {block(Published(tmp_path), INDEX) for block in rows.BLOCKS.values()} == {rows.UNPUBLISHED}


def test_blocks_and_claims_are_filled(published):
    text = "It is 0<!-- claim: fit-vs-auto --> times.\n\n<!-- generated: readme -->\nold\n<!-- end -->\n"

    new = markdown.rewrite(text, published, README)

    assert "It is 4.6<!-- claim: fit-vs-auto --> times." in new
    assert "old" not in new
    assert "<!-- generated: readme -->\n\n| `--kv-cache-dtype` |" in new
    assert markdown.rewrite(new, published, README) == new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: nothing -->\n<!-- end -->\n", "a block must be one of .*, but got 'nothing'"),
        ("<!-- generated: readme -->\n", "every block must end with"),
        ("2.0<!-- claim: nothing --> times", "a claim must be one of .*, but got 'nothing'"),
        ("twice<!-- claim: fit-vs-auto -->", "a number must stand before every claim"),
        ("2.0<!-- claim:\nfit-vs-auto --> times", "a number must stand before every claim"),
    ],
)
def test_wrong_markers_are_errors(text, message, published):
    with pytest.raises(ValueError, match=message):
        markdown.rewrite(text, published, README)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 2.2 times faster, 16,316 tokens/s and 3%.", ["2.2 times", "16,316 tokens/s", "3%"]),
        ("It takes 77 us or\n8.34 ms.", ["77 us", "8.34 ms"]),
        ("It breaks after 77\nus.", ["77\nus"]),
        ("GSM8K is 0.586, and 0.600<!-- claim: gsm8k-bf16 --> with bf16.", ["0.586"]),
        ("It is 2.2<!-- claim: cached-vs-fp8 --> times, of 64 requests.", []),
        ("`2 times` and\n\n```\n3%\n```\n\n| 4% |\n", []),
        ("<!-- generated: readme -->\n5%\n<!-- end -->\n", []),
    ],
)
def test_figures_without_a_claim_are_found(text, found):
    assert markdown.unclaimed(text) == found


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(16316.5, 0, "16,316"), (5.755, 2, "5.76"), (0.0449, 1, "0.0"), (-0.04, 1, "0.0"), (821384, 0, "821,384")],
)
def test_numbers_are_rounded_as_written(value, digits, text):
    """The decimal number in the file, its halves to even."""
    assert fixed(value, digits) == text


def test_losses_and_accuracies():
    assert [loss(value) for value in (0.00284, 0.105049, 6.4452, None)] == ["0.0028", "0.105", "6.45", "-"]
    assert accuracy({"task_accuracy": 0.588, "task_stderr": 0.02201}) == "0.588 ± 0.022"
    assert accuracy({}) == "-"


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="a row must have 2 cells"):
        table(["a", "b"], [["1"]])


def test_hashes_are_read_back_from_a_picture(published):
    path = ROOT / "docs" / "benchmarks" / "kernel_bandwidth.png"
    assert pictures.png_text(path.read_bytes(), pictures.KEYWORD) == f"kernel_h200:{published.sha256('kernel_h200')}"
    assert pictures.png_text(path.read_bytes(), "no such text") is None
