"""Pictures of results with made-up numbers: what is drawn, and what is refused."""

import argparse
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kvtuner_tools.bench import pictures
from kvtuner_tools.bench.kernel import SCHEMA as KERNEL_SCHEMA
from kvtuner_tools.bench.kernels.packed import packed_format
from kvtuner_tools.bench.serve_result import SCHEMA as SERVE_SCHEMA
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS

HEAD = {"created": "2000-01-01T00:00:00+00:00", "device": "a card", "versions": {"python": "3", "torch": "9.9"}}
POINTS = ("64x8192", "8x32000", "1x131072", "mixed:64:256-16128")


def kernel_result(points=POINTS, transforms=("none",)) -> dict:
    entries = []

    def add(implementation, name, nominal, stored, point, transform, fraction):
        entries.append(
            {
                "implementation": implementation, "format": name, "transforms": transform, "nominal_bits": nominal,
                "stored_bits": stored, "shape": "32/8/128", "block_size": 16, "point": point,
                "us": 500 * stored / 16 / fraction, "fraction_measured": fraction, "failure": None,
            }
        )  # fmt: skip

    for step, point in enumerate(points):
        lost = 0.06 * step
        for name, implementation, bits, fraction in (
            ("bf16", "fa3_bf16", 16.0, 0.95), ("fp8", "fa3_fp8", 8.0, 0.72), ("int4", "int4_per_token_head", 4.25, 0.1),
        ):  # fmt: skip
            add(implementation, name, round(bits), bits, point, "none", fraction - 0.3 * lost)
        for transform in transforms:
            for index, pair in enumerate(QUANTIZED_PAIRS):
                stored = packed_format(pair, 128).stored_bits(128)
                add("triton", pair.name, float(pair.nominal_bits), stored, point, transform, 0.8 - 0.03 * index - lost)
                add("cuda", pair.name, float(pair.nominal_bits), stored, point, transform, 0.96 - 0.01 * index - lost)
    entries.append({**entries[0], "point": "1x1", "us": None, "failure": "RuntimeError: no"})
    return {"schema": KERNEL_SCHEMA, **HEAD, "bandwidth": {"measured_bytes_s": 4.37e12}, "decode": entries}


def rows_result() -> dict:
    """Of two layers and four entries of query tokens, one of which a kernel does not serve."""
    result = kernel_result(points=("64x8192",))
    entries = []
    for shape in ("32/8/128", "64/8/128"):
        group = int(shape.partition("/")[0]) // 8
        for step, tokens in enumerate(("1", "4", "8", "1+4")):
            for entry in result["decode"]:
                if entry["us"] and not (tokens == "8" and entry["implementation"] == "int4_per_token_head"):
                    rows = group * int(tokens[-1])
                    entries.append({**entry, "shape": shape, "query_tokens": tokens, "rows_per_kv_head": rows,
                                    "us": entry["us"] * (step + 1)})  # fmt: skip
    return {**result, "decode": entries}


def serve_result() -> dict:
    settings = []
    for index, (label, bits) in enumerate(
        {"auto": 16.0, "fp8": 8.0, "kvtuner:K4V4": 4.25, "kvtuner:llama31_3.25bit": 3.5}.items()
    ):
        points = [
            {"batch": batch, "context": context, "decode_ms": 6 + batch * context / 32768 * bits / 16}
            for batch, context in ((64, 1024), (64, 8192), (8, 32000))
        ]
        throughput = [
            {
                "prompt": prompt, "output": 512, "output_tok_s": 1000.0 * (index + 1),
                "repeat_tok_s": 1500.0 * (index + 1),
                "decode_tok_s": None if (index, prompt) == (3, 1024) else 90_000 / bits,
            }
            for prompt in (1024, 4096, 16384)
        ]  # fmt: skip
        settings.append(
            {
                "label": label, "nominal_bits": round(bits), "stored_bits": bits, "points": points,
                "throughput": throughput, "long_prefill": [], "error": None,
            }
        )  # fmt: skip
    failed = {"label": "fp8_e5m2", "nominal_bits": None, "stored_bits": None, "points": [], "throughput": [],
              "long_prefill": [], "error": "RuntimeError: no"}  # fmt: skip
    return {"schema": SERVE_SCHEMA, **HEAD, "model": "llama31_8b", "settings": [*settings, failed]}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def bars(axis) -> dict[str, float]:
    """Heights above each tick, in order from the left."""
    names = {tick: label.get_text() for tick, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)}
    found: dict[str, list[float]] = {name: [] for name in names.values()}
    for patch in sorted(axis.patches, key=lambda patch: patch.get_x()):
        middle = patch.get_x() + patch.get_width() / 2
        found[names[min(names, key=lambda tick: abs(tick - middle))]].append(round(patch.get_height(), 3))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.parametrize("result", [kernel_result(), serve_result()], ids=["kernel", "serve"])
def test_written_whole(result, suffix, start, tmp_path):
    pictures.draw(result, tmp_path / f"picture{suffix}")

    assert [path.name for path in tmp_path.iterdir()] == [f"picture{suffix}"]
    assert (tmp_path / f"picture{suffix}").read_bytes().startswith(start)


@pytest.mark.slow
def test_a_panel_per_batch_with_a_bar_per_implementation(drawn, tmp_path):
    pictures.draw(kernel_result(), tmp_path / "picture.png")

    (figure,) = drawn
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == list(POINTS)
    heights = bars(figure.axes[0])
    assert heights["bf16\n16 / 16"] == [95.0]
    assert heights["K8V8\n8 / 8.25"] == [80.0, 96.0]
    assert list(heights)[3:] == [
        f"{pair.name}\n{float(pair.nominal_bits):g} / {packed_format(pair, 128).stored_bits(128):g}"
        for pair in QUANTIZED_PAIRS
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "fa3_bf16", "fa3_fp8", "int4_per_token_head", "triton", "cuda",
    ]  # fmt: skip


@pytest.mark.slow
def test_kernels_without_transforms_stand_beside_ours_with_any(drawn, tmp_path):
    pictures.draw(kernel_result(points=POINTS[:1], transforms=("none", "all")), tmp_path / "picture.png")

    plain, transformed = drawn[0].axes
    assert "transforms: all" in transformed.get_title()
    for axis in (plain, transformed):
        assert bars(axis)["fp8\n8 / 8"] == [72.0]
        assert len(bars(axis)["K4V4\n4 / 4.25"]) == 2


@pytest.mark.slow
def test_several_query_tokens_are_lines_over_them(drawn, tmp_path):
    pictures.draw(rows_result(), tmp_path / "picture.png")

    first, second = drawn[0].axes
    assert [label.get_text() for label in first.get_xticklabels()] == [
        "1\n4 rows",
        "4\n16 rows",
        "1+4\n16 rows",
        "8\n32 rows",
    ]
    assert [label.get_text() for label in second.get_xticklabels()][-1] == "8\n64 rows"
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    lines = dict(zip(names, first.lines, strict=True))
    assert len(lines) == 3 + 2 * len(QUANTIZED_PAIRS)
    one, four, mixed, eight = lines["fa3_fp8 fp8"].get_ydata()
    assert (four / one, mixed / one, eight / one) == pytest.approx((2, 4, 3))
    assert list(lines["int4_per_token_head int4"].get_xdata()) == [0, 1, 2], "what was not measured has no point"
    assert lines["cuda K4V4"].get_color() == lines["triton K4V4"].get_color() != lines["cuda K8V8"].get_color()
    assert lines["cuda K4V4"].get_marker() != lines["triton K4V4"].get_marker()


@pytest.mark.slow
def test_one_entry_of_query_tokens_stands_in_the_title(drawn, tmp_path):
    result = rows_result()
    for tokens in ("1", "4"):
        entries = [entry for entry in result["decode"] if entry["query_tokens"] == tokens]
        pictures.draw({**result, "decode": entries}, tmp_path / "picture.png")
    titles = [[axis.get_title() for axis in figure.axes] for figure in drawn]
    assert titles == [
        ["64x8192, heads 32/8/128, block 16", "64x8192, heads 64/8/128, block 16"],
        ["64x8192, heads 32/8/128, block 16, 4 query tokens, 16 rows",
         "64x8192, heads 64/8/128, block 16, 4 query tokens, 32 rows"],
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("query_tokens", [None, 4])
def test_results_of_older_schemas_are_drawn(drawn, tmp_path, query_tokens):
    """Their cases have one number of query tokens, and failed ones none."""
    result = {**kernel_result(points=POINTS[:1]), "schema": "kvtuner-bench-kernel/3"}
    for entry in result["decode"]:
        if query_tokens and entry["us"]:
            entry["query_tokens"] = query_tokens
    pictures.draw(result, tmp_path / "picture.png")
    assert drawn[0].axes[0].get_title().endswith("4 query tokens, 16 rows" if query_tokens else "block 16")


@pytest.mark.slow
def test_speculation_is_in_the_title(drawn, tmp_path):
    for result in (serve_result(), serve_result() | {"speculate": "3:0.7"}):
        pictures.draw(result, tmp_path / "picture.png")

    plain, speculated = (figure.get_suptitle().splitlines()[0] for figure in drawn)
    assert plain == "llama31_8b, dummy weights"
    assert speculated == f"{plain}, 3 drafted tokens a step, each accepted with probability 0.7"


@pytest.mark.slow
def test_throughput_by_context_and_decode_time(drawn, tmp_path):
    pictures.draw(serve_result(), tmp_path / "picture.png")

    loop, cached, alone, decode = drawn[0].axes
    assert bars(loop) == {name: [1000.0, 2000.0, 3000.0, 4000.0] for name in ("1024x512", "4096x512", "16384x512")}
    assert bars(cached)["4096x512"] == [1500.0, 3000.0, 4500.0, 6000.0]
    assert len(bars(alone)["1024x512"]) == 3, "a setting that never decoded alone has no bar"
    assert list(bars(decode)) == ["64x1024", "64x8192", "8x32000"]
    assert bars(decode)["64x8192"][0] == 22.0
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names[2] == "kvtuner:K4V4 (4 nominal, 4.25 stored bits)"
    assert len(names) == 4, "a setting that failed is left out"


def test_points_alone_make_one_panel(drawn, tmp_path):
    result = serve_result()
    for entry in result["settings"]:
        entry["throughput"] = []
    pictures.draw(result, tmp_path / "picture.png")
    assert len(drawn[0].axes) == 1


def test_nothing_to_draw(tmp_path):
    for result in ({**kernel_result(), "decode": []}, {**serve_result(), "settings": []}, {"schema": "other/1"}):
        with pytest.raises(ValueError, match=r"a picture .*, but got"):
            pictures.draw(result, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command(tmp_path, capsys):
    result, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    result.write_text(json.dumps(serve_result()))
    parser = argparse.ArgumentParser()
    pictures.add_arguments(parser)

    assert pictures.run(parser.parse_args([str(result), str(picture)])) == 0
    assert picture.exists()


def test_what_could_not_be_drawn_is_refused_beforehand(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in .png or .svg, but got '.gif'"):
        pictures.check_picture(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="must be in a folder that exists"):
        pictures.check_picture(tmp_path / "none" / "a.png")
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-kvtuner\[bench\]'"):
        pictures.check_picture(Path(tmp_path / "a.png"))
