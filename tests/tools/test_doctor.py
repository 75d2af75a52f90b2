"""``kvtuner doctor``: what it says of this environment, of what is wrong in it, and of kernels that err."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
import vllm

from kvtuner_tools import cli, doctor, machine
from tests.helpers.engine import cpu_only
from vllm_kvtuner.kernels import choice, gpu, self_test
from vllm_kvtuner.kernels.gpu import GpuKernels
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.kernels.trial import Verdict
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.profile import TransformSettings
from vllm_kvtuner.profile.statics import LayerStatics, save_statics

CPU = torch.device("cpu")
ALL = TransformSettings(True, True, True, True, True)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
}
PROFILE = """\
version: 1
layers: {0: K16V16, 1: K8V4, 2-3: K4V4}
transforms: {key_hadamard: true, key_offset: true, overrides: {1: {key_offset: false}}}
statics: statics.safetensors
"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("KVTUNER_PROFILE", "KVTUNER_DECODE_KERNEL", "KVTUNER_KERNEL_CACHE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def profile(tmp_path):
    offset = LayerStatics(key_offset=np.zeros((2, 64), np.float32))
    save_statics(tmp_path / "statics.safetensors", {2: offset, 3: offset}, {})
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture
def diagnose(capsys):
    """Runs the command: exit status and report, with the problems as text alone."""

    def run(*arguments):
        status = cli.main(["doctor", *map(str, arguments), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert report["schema"] == "kvtuner-doctor/1"
        assert report["serves"] == (status == 0) == (not report["problems"])
        assert all(each["do"] for each in report["problems"])
        return report | {"problems": [each["problem"] for each in report["problems"]]}

    return run


@pytest.mark.slow
@cpu_only
def test_without_a_model_it_says_what_is_here_and_tests_three_pairs(diagnose):
    report = diagnose()
    assert report["problems"] == []
    assert report["software"]["vllm"] == vllm.__version__
    assert report["software"]["vllm_serves"] == "cpu"
    assert report["device"]["device"] == "cpu"
    assert report["plugin"]["loaded_by_vllm"]
    assert report["plugin"]["broken_seams"] == 0
    assert [fact["kind"].split()[0] for fact in report["kernels"]] == ["K8V8", "K4V4", "K2V2"]
    for fact in report["kernels"]:
        assert fact["decode"] == fact["store_and_gather"] == "compiled"
        assert fact["self_test"] == "passed"
        assert 0.4 < fact["errors"]["store"] <= 0.51


@pytest.mark.slow
@cpu_only
def test_a_models_layers_are_grouped_by_what_serves_them(diagnose, model, profile):
    (model / "model.safetensors").write_bytes(bytes(1000))
    report = diagnose(model, "--profile", profile)
    (section,) = report["profiles"]
    assert section["profile"] == str(profile)
    # Layer 0 takes 2 heads x 4 x 64 bytes, layer 1 (64 + 32 + 8), layers 2 and 3 (32 + 32 + 8) per head.
    assert section["bytes_per_token"] == 2 * (256 + 104 + 72 + 72)
    assert section["stored_bits"] == pytest.approx(16 * section["bytes_per_token"] / section["bytes_per_token_in_bf16"])
    assert section["layers_in_vllms_own_cache"] == "0"
    tokens = (report["device"]["free_memory"] - 1000) // section["bytes_per_token"]
    assert section["tokens_in_free_memory_without_the_weights"] == tokens // 16 * 16
    assert {fact["kind"]: fact["layers"] for fact in report["kernels"]} == {
        "K8V4 of head size 64 with key_hadamard": "1",
        "K4V4 of head size 64 with key_offset, key_hadamard": "2-3",
    }


@pytest.mark.slow
@cpu_only
def test_text_says_the_same(capsys, model, profile):
    assert cli.main(["doctor", str(model), "--profile", str(profile)]) == 0
    captured = capsys.readouterr().out
    assert captured.startswith("software\n  Python ")
    assert "  bytes per token                            1,008\n" in captured
    assert "  K4V4 of head size 64 with key_offset, key_hadamard\n    layers            2-3\n" in captured
    assert captured.endswith("\nproblems: none\n")


@pytest.mark.slow
def test_the_profile_comes_from_the_environment_as_in_serving(diagnose, model, monkeypatch):
    monkeypatch.setenv("KVTUNER_PROFILE", "K8V2")
    assert [fact["kind"] for fact in diagnose(model)["kernels"]] == [
        "K8V2 of head size 64 with key_offset, key_hadamard, value_hadamard, range_search"
    ]


def test_all_problems_of_a_profile_and_text_of_them(diagnose, model, capsys):
    problems = diagnose(model, "--profile", "smollm2_135m_window_4.50bit")["problems"]
    assert any("model.num_layers must be 4" in problem for problem in problems)
    assert cli.main(["doctor", str(model), "--profile", "smollm2_135m_window_4.50bit"]) == 1
    captured = capsys.readouterr().out
    assert "model.num_layers must be 4" in captured
    assert "\n    do: give a profile of this model: kvtuner profile list" in captured


@pytest.mark.parametrize(
    ("arguments", "problem", "advice"),
    [
        (["/nonexistent", "--profile", "K8V8"], "but got no such folder", "give a folder with a config.json"),
        (["--profile", "nope"], "or the name of a shipped profile", "kvtuner profile list names"),
        (["--profile", "K3V3"], "k_bits must be one of", "correct what the line names"),
    ],
)
def test_advice_is_of_the_kind_of_problem(capsys, arguments, problem, advice):
    assert cli.main(["doctor", *arguments, "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any(problem in each["problem"] and each["do"].startswith(advice) for each in problems), problems


def test_a_problem_of_three_default_profiles_is_said_once(diagnose, tmp_path):
    (problem,) = diagnose(tmp_path)["problems"]
    assert "folder with a config.json" in problem


def test_broken_statics(diagnose, model, profile):
    statics = profile.parent / "statics.safetensors"
    statics.write_bytes(statics.read_bytes()[:-1])
    (problem,) = diagnose(model, "--profile", profile)["problems"]
    assert problem.startswith(f"{statics}: the file must be a complete safetensors file")


@cpu_only
def test_a_vllm_that_is_not_served(diagnose, monkeypatch):
    monkeypatch.setitem(machine.SERVED_VERSIONS, "cpu", ("0.1.0", "0.2.0"))
    monkeypatch.setattr(vllm, "__version__", "0.3.0+cpu")
    (problem,) = diagnose("--profile", "K8V8")["problems"]
    assert problem == "vLLM 0.3.0+cpu for cpu is not served, since the plugin fits 0.1.0's and 0.2.0's internals"


def test_a_vllm_whose_internals_differ(diagnose, monkeypatch):
    def changed():
        raise AttributeError("no such seam")

    monkeypatch.setattr(machine, "register", changed)
    (problem,) = diagnose("--profile", "K8V8")["problems"]
    assert problem == "the plugin does not fit this vLLM: AttributeError: no such seam"


def test_a_vllm_that_has_moved_what_the_plugin_patches(diagnose, monkeypatch):
    monkeypatch.delattr("vllm.v1.worker.gpu_worker.Worker.wake_up")
    monkeypatch.setattr(machine, "register", lambda: pytest.fail("a plugin that does not fit is not loaded"))
    report = diagnose("--profile", "K8V8")
    (problem,) = report["problems"]
    assert problem.startswith("seam 'waking up' is broken: vllm.v1.worker.gpu_worker:Worker.wake_up: AttributeError")
    assert report["plugin"]["broken_seams"] == 1


@pytest.mark.slow
def test_no_vllm_and_no_torch():
    absent = "sys.modules.update(dict.fromkeys(['cuda', 'torch', 'transformers', 'triton', 'vllm']))"
    program = f"import sys; {absent}; from kvtuner_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "doctor", "--profile", "llama31_3.25bit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert [each["problem"] for each in report["problems"]] == ["torch is not installed", "vLLM is not installed"]
    assert report["profiles"][0]["stored_bits"] == 3.5
    assert report["kernels"] == []


def test_a_package_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "needs_a_library.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine._missing("needs_a_library") == "cannot be imported: OSError: libcudart.so: cannot open"


@cpu_only
def test_no_device_that_vllm_can_use(diagnose, monkeypatch):
    monkeypatch.setattr(machine, "vllm_device", lambda: "")
    problems = diagnose("--profile", "K8V8")["problems"]
    assert "finds no device that the plugin serves here, but none" in problems[0]
    assert "finds no GPU" in problems[1]


def test_the_plugin_is_left_out(diagnose, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    (problem,) = diagnose("--profile", "K8V8")["problems"]
    assert problem == "VLLM_PLUGINS='other' leaves the plugin out"


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        pytest.param([], "no entry point kvtuner", id="not installed"),
        pytest.param(
            [EntryPoint("kvtuner", "vllm_kvtuner.gone:register", "vllm.general_plugins")],
            "vLLM cannot import vllm_kvtuner.gone:register",
            id="broken",
        ),
    ],
)
def test_the_entry_point_is_not_there(diagnose, monkeypatch, entries, message):
    found = importlib.metadata.entry_points

    def entry_points(**selection):
        return EntryPoints(entries) if selection == {"group": "vllm.general_plugins"} else found(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    (problem,) = diagnose("--profile", "K8V8")["problems"]
    assert message in problem


# The folder of compiled kernels


def test_a_kernel_cache_is_a_problem_only_where_it_is_used(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(folder))
    assert machine.kernel_cache(used=False).problems == []
    ((problem, advice),) = machine.kernel_cache(used=True).problems
    assert "must belong to user" in problem and "writable by no other" in problem
    assert "KVTUNER_KERNEL_CACHE" in advice
    folder.chmod(0o700)
    section = machine.kernel_cache(used=True)
    assert section.problems == []
    assert section.facts["exists"] and section.facts["writable"] and section.facts["free space"] > 0


def test_a_kernel_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    ((problem, _),) = machine.kernel_cache(used=True).problems
    assert problem == f"{tmp_path}/file is no folder that you may write to"


def test_a_kernel_cache_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    ((problem, _),) = machine.kernel_cache(used=True).problems
    assert problem == f"the disk of {tmp_path} has less than 64 MiB left"


# Which kernels


RIGHT = Verdict(seconds=0.05)
WRONG = Verdict("K4V2 of head size 128: decode error 0.25 above 0.005", seconds=0.05)


@pytest.mark.parametrize(
    ("capability", "asked", "head_size", "verdict", "decode", "rows"),
    [
        ((9, 0), None, 128, RIGHT, "cuda", "cuda"),
        ((9, 0), None, 96, RIGHT, "triton, since head_size 96 with 2-bit values", "cuda"),
        ((9, 0), "triton", 128, RIGHT, "triton, since KVTUNER_DECODE_KERNEL is 'triton'", "triton"),
        ((7, 5), None, 128, RIGHT, "triton, since compute capability (7, 5)", "triton"),
        ((10, 0), None, 128, RIGHT, "cuda", "cuda"),
        ((10, 0), None, 128, WRONG, "triton, since the CUDA kernels failed their self-test", "triton, since the CUDA"),
        ((9, 0), None, 96, WRONG, "triton, since head_size 96 with 2-bit values", "triton, since the CUDA kernels"),
    ],
)
def test_choices_are_the_engines(monkeypatch, capability, asked, head_size, verdict, decode, rows):
    monkeypatch.setattr(choice, "device_capability", lambda device: capability)
    if asked:
        monkeypatch.setenv("KVTUNER_DECODE_KERNEL", asked)
    group = doctor.Group("0", PrecisionPair(4, 2), head_size, TransformSettings())
    choices = doctor._choices(group, torch.device("cuda", 0), verdict)
    assert choices["decode"].startswith(decode)
    assert choices["store and gather"].startswith(rows)
    tested = capability >= (8, 0) and asked != "triton"
    assert choices.get("CUDA kernels") == (f"self-test {verdict}" if tested else None)


@pytest.fixture
def gpu_card(monkeypatch):
    """Sets what the self-test of the CUDA kernels finds, or raises; the reference stands for what serves."""

    def set_card(verdict):
        def prove(cases, device):
            assert {case.layout.pair for case in cases} == {PrecisionPair(4, 4)}
            if isinstance(verdict, Exception):
                raise verdict
            return verdict

        monkeypatch.setattr(gpu, "prove", prove)
        monkeypatch.setattr(choice, "device_capability", lambda device: (8, 9))
        monkeypatch.setattr(doctor, "_serving", lambda case, device: ReferenceKernels(case.shape, case.span))
        measure = self_test.measure
        monkeypatch.setattr(self_test, "measure", lambda case, kernels, device: measure(case, kernels, CPU))
        card = machine.Section("device", {"device": "a card"})
        return doctor._kernels([doctor.Group("0", PrecisionPair(4, 4), 64, TransformSettings())], card)

    return set_card


@pytest.mark.slow
def test_it_tells_what_the_cards_self_test_found(gpu_card):
    section = gpu_card(Verdict(in_a_process=True, seconds=7.25))
    assert section.problems == []
    (fact,) = section.facts.values()
    assert fact["CUDA kernels"].startswith("self-test passed after 7.25 s (first in a process of its own")
    assert (fact["decode"], fact["self-test"]) == ("cuda", "passed")
    assert "\n    CUDA kernels      self-test passed after 7.25 s" in doctor._format(section)


def test_a_card_that_fails_is_told_and_served_by_triton(gpu_card):
    section = gpu_card(WRONG)
    assert section.problems == [], "Triton's kernels are right"
    (fact,) = section.facts.values()
    assert fact["CUDA kernels"] == f"self-test failed: {WRONG.failure}; after 0.05 s"
    assert fact["decode"] == f"triton, since the CUDA kernels failed their self-test on this card ({WRONG.failure})"


def test_cuda_asked_for_on_a_card_that_fails_is_a_problem(gpu_card, monkeypatch):
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", "cuda")
    ((problem, advice),) = gpu_card(WRONG).problems
    assert problem.startswith("KVTUNER_DECODE_KERNEL is 'cuda', but the CUDA kernels failed their self-test")
    assert advice.startswith("unset KVTUNER_DECODE_KERNEL")


def test_round_feedback_on_a_card_is_tested(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "prove", lambda cases, device: asked.extend(cases) or RIGHT)
    monkeypatch.setattr(doctor, "_choices", lambda group, device, verdict: {})
    monkeypatch.setattr(doctor, "_self_test", lambda *_: None)
    group = doctor.Group("0", PrecisionPair(4, 2), 64, TransformSettings(key_round_feedback=True))
    section = doctor._kernels([group], machine.Section("device", {"device": "a card"}))
    assert section.problems == []
    assert [case.transforms for case in asked] == [("key_round_feedback",)]


@pytest.mark.parametrize("error", [ValueError("the folder"), RuntimeError("the context")])
def test_a_self_test_that_ends_in_an_error_is_a_problem(gpu_card, error):
    section = gpu_card(error)
    ((problem, advice),) = section.problems
    assert problem == str(error) and "KVTUNER_DECODE_KERNEL=triton" in advice
    (fact,) = section.facts.values()
    assert fact == {"layers": "0", "self-test": "not run"}


def test_a_kernel_that_cannot_be_had_is_a_problem(monkeypatch):
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", "cuda")
    monkeypatch.setattr(choice, "device_capability", lambda device: (7, 5))
    card = machine.Section("device", {"device": "a card"})
    section = doctor._kernels([doctor.Group("0", PrecisionPair(4, 4), 128, TransformSettings())], card)
    ((problem, _),) = section.problems
    assert problem.startswith("KVTUNER_DECODE_KERNEL is 'cuda', but compute capability (7, 5)")
    assert section.facts["K4V4 of head size 128"]["self-test"] == "not run"


# The self-test of what serves


@pytest.mark.slow
@cpu_only
def test_the_kernels_pass_interpreted(monkeypatch):
    """The path of a GPU, with the portable kernels."""
    monkeypatch.setattr(doctor, "BATCH", (3, 2))
    for transforms in (TransformSettings(), ALL):
        case = doctor._case(doctor.Group(None, PrecisionPair(4, 4), 64, transforms))
        kernels = GpuKernels(case.shape, case.span, case.limits, CPU)
        assert self_test.measure(case, kernels, CPU).problem is None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_the_kernels_pass(diagnose, monkeypatch, kernel):
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", kernel)
    report = diagnose()
    assert report["problems"] == []
    assert report["device"]["compute_capability"]
    assert report["kernel_cache"]["used"] == (kernel == "cuda")
    for fact in report["kernels"]:
        assert fact["decode"].startswith(kernel) and fact["self_test"] == "passed"
        assert fact.get("cuda_kernels", "").startswith("self-test passed") == (kernel == "cuda")


def write_nothing(*_):
    pass


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", ["store", "gather", "attend"])
def test_kernels_that_err_are_told(monkeypatch, method):
    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "reference")
    monkeypatch.setattr(ReferenceKernels, method, write_nothing)
    group = doctor.Group("0-3", PrecisionPair(4, 4), 64, ALL)
    section = doctor._kernels([group], machine.Section("device", {"device": "cpu"}))
    (fact,) = section.facts.values()
    assert fact["self-test"] == "failed"
    ((problem, _),) = section.problems
    assert "the self-test's results are wrong" in problem


@pytest.mark.slow
@cpu_only
def test_json_has_no_nan(diagnose, monkeypatch):
    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "reference")
    monkeypatch.setattr(ReferenceKernels, "store", write_nothing)
    report = diagnose("--profile", "K8V8")
    (fact,) = report["kernels"]
    assert fact["errors"]["store"] is None and fact["self_test"] == "failed"


def test_a_kernel_that_does_not_run_is_told(monkeypatch):
    def crash(*_):
        raise RuntimeError("no such image")

    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "reference")
    monkeypatch.setattr(ReferenceKernels, "store", crash)
    group = doctor.Group(None, PrecisionPair(4, 4), 64, TransformSettings())
    section = doctor._kernels([group], machine.Section("device", {"device": "cpu"}))
    ((problem, _),) = section.problems
    assert problem == "K4V4 of head size 64: the self-test stopped with RuntimeError: no such image"
