"""``kvtuner bench serve``: arguments, failures, resuming, refusals; no engine runs."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest

from kvtuner_tools import bench
from kvtuner_tools.bench import serve
from kvtuner_tools.bench.points import LongPrefill, Point, ThroughputPoint
from kvtuner_tools.bench.presets import SHAPES
from kvtuner_tools.bench.speculation import Speculation
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.flashinfer import CUBIN, decode_environment
from kvtuner_tools.engines.serve import ServeJob, token_range
from tests.helpers.serve_bench import ENGINE, POINT, lines
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape

OPTIONS = ("--shape=llama31_8b", "--points=64x1024")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["serve", *words])


def test_arguments() -> None:
    args = parse("--shape=llama31_8b", "--setting=auto", "--setting=kvtuner:K8V8")

    assert args.setting == [CacheSetting("auto"), CacheSetting("kvtuner", "K8V8")]
    assert (args.points, args.output_tokens, args.gpu_memory_utilization, args.max_model_len) == (
        "64x1024,64x8192,8x32000",
        64,
        0.85,
        33000,
    )
    assert (args.throughput, args.long_prefill, args.seconds) == ([], None, 20)
    for words in (["--setting=auto"], ["--shape=llama31_8b"], ["--shape=llama31_8b", "--setting=kvtuner"]):
        with pytest.raises(SystemExit):
            parse(*words)


def test_arguments_of_throughput_and_long_prefill() -> None:
    args = parse(
        *OPTIONS, "--setting=auto", "--throughput=4096x512", "--throughput=32768x64", "--long-prefill=32768:8192"
    )

    assert args.throughput == [ThroughputPoint(4096, 512), ThroughputPoint(32768, 64)]
    assert args.long_prefill == LongPrefill(32768, 8192)
    for words in (["--throughput=4096"], ["--long-prefill=8192:32768"]):
        with pytest.raises(SystemExit):
            parse(*OPTIONS, "--setting=auto", *words)


def test_arguments_of_speculation() -> None:
    assert parse(*OPTIONS, "--setting=auto").speculate is None
    assert parse(*OPTIONS, "--setting=auto", "--speculate=3:0.7").speculate == Speculation(3, 0.7)
    with pytest.raises(SystemExit):
        parse(*OPTIONS, "--setting=auto", "--speculate=3")


def test_llama_shape() -> None:
    shape = ModelShape.from_hf_config(json.loads((SHAPES / "llama31_8b" / "config.json").read_text()), "llama31_8b")

    assert len(shape.layers) == 32
    assert {(layer.num_kv_heads, layer.head_size) for layer in shape.layers} == {(8, 128)}


def test_profile_for_80_layers_has_the_bits_and_transforms_of_llamas() -> None:
    path = str(SHAPES.parent / "profiles" / "llama33_70b_3.25bit.yaml")
    shapes = {path: (80, 1), "llama31_3.25bit": (32, 8)}

    ours, llamas = (
        load_profile(profile).resolve(ModelShape("m", "LlamaForCausalLM", (LayerShape(heads, 128),) * layers))
        for profile, (layers, heads) in shapes.items()
    )

    assert (ours.nominal_bits, ours.stored_bits) == (llamas.nominal_bits, llamas.stored_bits) == (3.25, 3.5)
    assert {layer.transforms for layer in ours.layers} == {layer.transforms for layer in llamas.layers}
    shares = [{pair: n / len(each.layers) for pair, n in Counter(layer.pair for layer in each.layers).items()}
              for each in (ours, llamas)]  # fmt: skip
    assert shares[0] == shares[1]


def test_prompts_stay_comparable_and_inside_the_vocabulary() -> None:
    assert token_range(128_256) == (1000, 100_000)
    assert token_range(512) == (256, 512)


class Engines:
    """Stands in for engines' processes: writes lines, and fails or is interrupted where told to.

    FlashInfer's backend needs ``environment``, or fails with it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **failures: BaseException) -> None:
        self.jobs: list[ServeJob] = []
        self.configs: list[dict] = []
        self.failures = failures
        self.environment: dict[str, str] | ValueError = {CUBIN: "1"}
        monkeypatch.setattr(serve, "in_own_process", self)

    def __call__(self, function: object, job: ServeJob | CacheSetting) -> dict[str, str] | None:
        if function is decode_environment:
            assert isinstance(job, CacheSetting) and job.attention_backend == "FLASHINFER"
            if isinstance(self.environment, ValueError):
                raise self.environment
            return self.environment
        assert function is serve.measure and isinstance(job, ServeJob)
        self.jobs.append(job)
        self.configs.append(json.loads((job.model / "config.json").read_text()))
        job.lines.write_text("".join(json.dumps(line) + "\n" for line in lines(ENGINE, POINT)))
        if failure := self.failures.get(job.setting.label):
            raise failure
        return None

    @property
    def labels(self) -> list[str]:
        return [job.setting.label for job in self.jobs]


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provenance asks for the card in a process of its own, which costs seconds."""
    monkeypatch.setattr(serve, "provenance", lambda: {"created": "now", "versions": {}, "device": "a card"})


def test_json_is_the_result_and_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    Engines(monkeypatch)
    out = tmp_path / "out.json"
    assert bench.run(parse(*OPTIONS, "--setting=fp8", "--json", f"--out={out}")) == 0
    printed = capfd.readouterr().out
    assert json.loads(printed) == json.loads(out.read_text())
    assert json.loads(printed)["schema"] == serve.SCHEMA


def test_run_keeps_the_points_of_a_failed_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    engines = Engines(monkeypatch, fp8=RuntimeError("out of memory"))
    out = tmp_path / "out.json"

    status = bench.run(
        parse(*OPTIONS, "--setting=fp8", "--setting=kvtuner:K8V8", "--kv-cache-memory-bytes=512MiB", f"--out={out}"),
    )

    result = json.loads(out.read_text())
    assert status == 1
    assert [(job.points, job.vocab_size, job.kv_memory_bytes, job.max_num_seqs) for job in engines.jobs] == [
        ((Point(64, 1024),), 128_256, 1 << 29, 256)
    ] * 2
    assert [entry["points"] for entry in result["settings"]] == [[POINT]] * 2
    assert [entry["error"] for entry in result["settings"]] == ["RuntimeError: out of memory", None]
    assert result["settings"][1]["stored_bits"] == 8.25
    assert "fp8: RuntimeError: out of memory" in capsys.readouterr().err


def test_a_run_cut_short_goes_on_at_the_setting_it_was_cut_short_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*OPTIONS, "--setting=auto", "--setting=fp8", "--setting=kvtuner:K4V4", f"--out={tmp_path / 'out.json'}")
    Engines(monkeypatch, fp8=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.run(parse(*words))

    engines = Engines(monkeypatch, fp8=RuntimeError("again"))
    assert bench.run(parse(*words)) == 1
    assert engines.labels == ["fp8", "kvtuner:K4V4"]

    engines = Engines(monkeypatch)
    assert bench.run(parse(*words)) == 0
    assert engines.labels == ["fp8"], "a failed setting is tried again, a finished one is not"
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["label"], entry["error"]) for entry in result["settings"]] == [
        ("auto", None), ("fp8", None), ("kvtuner:K4V4", None),
    ]  # fmt: skip


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.usefixtures("a_gpu")
def test_all_settings_speculate_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    engines, out = Engines(monkeypatch), tmp_path / "out.json"
    words = (*OPTIONS, "--setting=fp8", "--setting=kvtuner:K4V4", f"--out={out}")

    assert bench.run(parse(*words, "--speculate=3:0.7")) == 0

    assert [job.speculation for job in engines.jobs] == [Speculation(3, 0.7)] * 2
    assert [job.capture_sizes for job in engines.jobs] == [[4, 32, 128, 256, 512, 1024]] * 2
    assert json.loads(out.read_text())["speculate"] == "3:0.7"
    assert "dummy weights, 3 drafted tokens a step" in capsys.readouterr().out
    for others in ([], ["--speculate=3:0.8"]):
        with pytest.raises(ValueError, match="hold the same run, but got another speculate"):
            bench.run(parse(*words, *others))


@pytest.mark.usefixtures("a_gpu")
def test_drafts_need_room() -> None:
    words = ("--shape=llama31_8b", "--setting=auto", "--speculate=3:0.7", "--max-model-len=8192")
    for point, longest in (("--points=1x8000", 8000 + 4 * 128 + 3), ("--throughput=8000x64", 8000 + 5 * 64 + 3)):
        points = [] if point.startswith("--points") else ["--points=none"]
        with pytest.raises(ValueError, match=f"--max-model-len must be at least {longest} for these points"):
            bench.run(parse(*words, *points, point))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--speculate=3:0.7"], "--speculate needs a GPU: vLLM's sampler on a CPU has no synthetic acceptance"),
        (
            ["--setting=fp8@FLASHINFER"],
            "needs a GPU, since vLLM on a CPU has one alone, but got fp8@FLASHINFER",
        ),
    ],
)
def test_what_a_cpu_would_leave_aside_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        bench.run(parse(*OPTIONS, "--setting=auto", *words))
    assert engines.jobs == []


def test_another_profile_under_the_same_name_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "mine.yaml"
    words = (*OPTIONS, f"--setting=kvtuner:{profile}", f"--out={tmp_path / 'out.json'}")
    for pair in ("K8V8", "K4V4"):
        profile.write_text(f"version: 1\nlayers: {{0-31: {pair}}}\n")
        engines = Engines(monkeypatch)
        bench.run(parse(*words))
        assert len(engines.jobs) == 1
    assert json.loads((tmp_path / "out.json").read_text())["settings"][0]["nominal_bits"] == 4


@pytest.mark.usefixtures("a_gpu")
def test_a_rank_s_share_is_served_as_a_model_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(monkeypatch)
    words = ("--shape=llama33_70b:tp8", "--points=64x1024", f"--out={tmp_path / 'out.json'}")

    assert bench.run(parse(*words, "--setting=fp8@FLASHINFER", "--setting=kvtuner:K4V2")) == 0

    result = json.loads((tmp_path / "out.json").read_text())
    assert result["model"] == "llama33_70b:tp8"
    assert [entry["label"] for entry in result["settings"]] == ["fp8@FLASHINFER", "kvtuner:K4V2"]
    for config in engines.configs:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 1, 128)
    assert {job.vocab_size for job in engines.jobs} == {16032}
    # A run that is cut short goes on, though the share lies in another folder by then.
    assert bench.run(parse(*words, "--setting=fp8@FLASHINFER", "--setting=kvtuner:K4V2")) == 0
    assert len(engines.jobs) == 2


@pytest.mark.usefixtures("a_gpu")
def test_a_setting_with_a_backend_says_what_its_engine_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    engines = Engines(monkeypatch)
    words = (*OPTIONS, "--setting=fp8", "--setting=fp8@FLASHINFER", f"--out={tmp_path / 'out.json'}")

    assert bench.run(parse(*words)) == 0

    assert [job.environment for job in engines.jobs] == [{}, {CUBIN: "1"}]
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["attention_backend"], entry["environment"]) for entry in result["settings"]] == [
        (None, {}), ("FLASHINFER", {CUBIN: "1"}),
    ]  # fmt: skip
    assert "fp8@FLASHINFER: its engine runs with VLLM_HAS_FLASHINFER_CUBIN=1" in capsys.readouterr().out


@pytest.mark.usefixtures("a_gpu")
def test_a_backend_that_would_decode_by_another_kernel_is_refused_before_any_engine_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = Engines(monkeypatch)
    engines.environment = ValueError("fp8@FLASHINFER: vLLM must decode by XQA, but nvcc is missing")
    with pytest.raises(ValueError, match="must decode by XQA, but nvcc is missing"):
        bench.run(parse(*OPTIONS, "--setting=fp8", "--setting=fp8@FLASHINFER"))
    assert engines.jobs == []


def test_another_run_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Engines(monkeypatch)
    out = tmp_path / "out.json"
    bench.run(parse(*OPTIONS, "--setting=auto", f"--out={out}"))
    before = out.read_text()

    with pytest.raises(ValueError, match="must be a new file or hold the same run, but got another output_tokens"):
        bench.run(parse(*OPTIONS, "--setting=fp8", "--output-tokens=7", f"--out={out}"))
    assert out.read_text() == before
    out.write_text("{}")
    with pytest.raises(ValueError, match="must be a new file or a result of kvtuner-bench-serve/6, but got None"):
        bench.run(parse(*OPTIONS, "--setting=auto", f"--out={out}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--points=1x40000"], "--max-model-len must be at least 40128 for these points, but got 33000"),
        (["--throughput=32768x512"], "--max-model-len must be at least 33792 for these points, but got 33000"),
        (["--long-prefill=33000:8192"], "--max-model-len must be at least 33001 for these points, but got 33000"),
        (["--long-prefill=512:128"], "CHUNK must be at least --max-num-seqs, 256, as vLLM demands of a step"),
        (["--points=none"], "needs --points, --throughput or --long-prefill, but got none"),
        (["--shape=glm46:tp8"], "glm46:tp8 is a mixture of experts, which bench serve does not measure"),
        (["--shape=llama33_70b:tp7"], "num_attention_heads must be a multiple of the 7 ranks, but got 64"),
        (["--shape=llama2"], "a named shape is one of .*, but got 'llama2'"),
    ],
)
def test_what_no_engine_could_serve_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.run(parse("--shape=llama31_8b", "--setting=auto", *words))
