"""The shipped profiles: complete, of the published allocations, and with the bits they state."""

import json
from pathlib import Path

import pytest
import yaml

from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, content_bytes
from vllm_kvtuner.profile.load import ProfileError, load_profile, shipped_profiles
from vllm_kvtuner.profile.profile import FROM_WEIGHTS
from vllm_kvtuner.profile.shipped import EARLIER_NAMES, REPLACED
from vllm_kvtuner.profile.statics import load_statics

PUBLISHED = {
    "llama31_3.25bit": (3.250, "Meta-Llama-3.1-8B-Instruct_kivi_KVTuner4_1"),
    "llama31_4.91bit": (4.906, "Meta-Llama-3.1-8B-Instruct_kivi_KVTuner6_1"),
    "llama31_pertoken_3.59bit": (3.594, "Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner4_0"),
    "llama31_pertoken_5.44bit": (5.438, "Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner6_1"),
    "mistral7b_3.19bit": (3.188, "Mistral-7B-Instruct-v0.3_kivi_KVTuner4_1"),
    "mistral7b_pertoken_3.78bit": (3.781, "Mistral-7B-Instruct-v0.3_pertoken_KVTuner4_1"),
    "mistral7b_pertoken_5.38bit": (5.375, "Mistral-7B-Instruct-v0.3_pertoken_KVTuner6_1"),
    "qwen25_3b_3.17bit": (3.167, "Qwen2.5-3B-Instruct_kivi_KVTuner4_0"),
    "qwen25_3b_3.44bit": (3.444, "Qwen2.5-3B-Instruct_kivi_KVTuner4_1"),
    "qwen25_3b_pertoken_4.00bit": (4.000, "Qwen2.5-3B-Instruct_pertoken_KVTuner4_1"),
    "qwen25_3b_pertoken_5.06bit": (5.056, "Qwen2.5-3B-Instruct_pertoken_KVTuner6_0"),
    "qwen25_7b_3.93bit": (3.929, "Qwen2.5-7B-Instruct_kivi_KVTuner4_0"),
    "qwen25_7b_5.96bit": (5.964, "Qwen2.5-7B-Instruct_kivi_KVTuner6_0"),
    "qwen25_7b_pertoken_4.00bit": (4.000, "Qwen2.5-7B-Instruct_pertoken_KVTuner4_0"),
    "qwen25_7b_pertoken_5.00bit": (5.000, "Qwen2.5-7B-Instruct_pertoken_KVTuner6_1"),
}
"""Nominal bits as published and the reference implementation's file name."""
CALIBRATED = (
    "qwen25_coder_0.5b_feedback_3.00bit",
    "qwen25_coder_0.5b_feedback_3.50bit",
    "qwen25_coder_1.5b_feedback_2.25bit",
    "qwen25_coder_1.5b_feedback_2.50bit",
    "qwen25_coder_1.5b_feedback_3.00bit",
    "qwen25_coder_1.5b_feedback_3.50bit",
    "qwen25_coder_1.5b_feedback_4.25bit",
    "smollm2_135m_feedback_2.50bit",
    "smollm2_135m_feedback_3.00bit",
    "smollm2_135m_feedback_3.50bit",
    "smollm2_135m_window_4.50bit",
    "smollm2_135m_window_5.50bit",
)
"""Found by ``kvtuner calibrate``, with statics."""
HELDOUT = Path(__file__).parents[2] / "docs/benchmarks/data/2026-11-22_heldout_h200.json"
"""Scores of profiles that have left."""


def test_all_are_found():
    assert set(shipped_profiles()) == {*(f"published/{name}" for name in PUBLISHED), *CALIBRATED}


@pytest.mark.parametrize("name", shipped_profiles())
def test_nothing_is_shipped_that_nobody_measured_but_published_allocations(name):
    provenance = load_profile(name).provenance
    if name.startswith("published/"):
        assert provenance["note"].startswith("A published allocation, not measured as it is served here.")
    else:
        measured = provenance.get("heldout_scores", {}).get("this profile") or provenance["evaluation"]
        assert measured["kl_mean"] > 0


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", shipped_profiles())
def test_bits_stated_are_bits_computed(name):
    profile = load_profile(name)
    assert (profile.statics is not None) == (name in CALIBRATED)
    resolved = profile.resolve(profile.model)
    assert len(resolved.layers) == len(profile.model.layers)
    assert profile.provenance["nominal_bits"] == round(resolved.nominal_bits, 4)
    assert profile.provenance["stored_bits"] == round(resolved.stored_bits, 4)
    in_name = resolved.nominal_bits if name.startswith("published/") else resolved.stored_bits
    assert float(name.rpartition("_")[2].removesuffix("bit")) == pytest.approx(in_name, abs=0.00501)
    assert profile.provenance["source"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_allocations(name):
    nominal_bits, reference = PUBLISHED[name]
    profile = load_profile(name)
    assert profile.resolve(profile.model).nominal_bits == pytest.approx(nominal_bits, abs=0.00051)
    provenance = profile.provenance
    assert f"arXiv 2502.04420; its reference implementation's {reference}.yaml" == provenance["source"]
    assert ("pertoken" in reference) == ("pertoken" in name) == provenance["mode"].startswith("per-token")
    assert ("kivi" in reference) == provenance["mode"].startswith("KIVI")
    assert "found without transforms" in provenance["note"]
    assert (profile.recent_window, profile.recent_window_bits, profile.sink_tokens) == (64, 16, 4)
    assert profile.transforms.key_hadamard and profile.transforms.value_hadamard and profile.transforms.range_search


def test_llama_3_25_layer_by_layer():
    # The reference implementation's Meta-Llama-3.1-8B-Instruct_kivi_KVTuner4_1.yaml, layers 0 to 31.
    pairs = "22 44 44 44 22 42 42 44 42 42 42 42 42 84 42 42 42 84 42 42 42 42 42 42 42 22 42 22 42 44 42 44"
    profile = load_profile("llama31_3.25bit")
    assert " ".join(f"{pair.k_bits}{pair.v_bits}" for _, pair in sorted(profile.pairs.items())) == pairs


def test_llama_3_25_in_bytes():
    profile = load_profile("llama31_3.25bit")
    resolved = profile.resolve(profile.model)
    assert resolved.stored_bits == 3.5
    assert resolved.bytes_per_token == 28_672
    assert resolved.bf16_bytes_per_token == 131_072
    assert resolved.bytes_per_token == sum(8 * content_bytes(layer.pair, 128) for layer in resolved.layers)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_profiles_hold_what_they_promise(name):
    """As good as each uniform setting of no more stored bits or better, and with the statics that layers read."""
    profile = load_profile(name)
    scores = profile.provenance["heldout_scores"]
    ours = scores["this profile"]
    resolved = profile.resolve(profile.model)
    assert ours["stored_bits"] == round(resolved.stored_bits, 4)
    uniform = [score for origin, score in scores.items() if origin.startswith("uniform")]
    # Those with round feedback are compared with the best uniform one within the budget, and the next above it.
    assert len(uniform) == len(QUANTIZED_PAIRS) or "_feedback_" in name
    assert all(ours["kl_mean"] <= score["kl_mean"] for score in uniform if score["stored_bits"] <= ours["stored_bits"])
    transforms = {layer: profile.transform_overrides.get(layer, profile.transforms) for layer in profile.pairs}
    readers = {layer for layer, chosen in transforms.items() if chosen.needs_statics}
    assert set(load_statics(profile.statics, resolved)) == readers
    assert profile.recent_window == (64 if "_window_" in name or "_feedback_" in name else 0)
    assert profile.sink_tokens == (4 if name.startswith("smollm2_135m_window_") or "_feedback_" in name else 0)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("earlier", "name"), EARLIER_NAMES.items())
def test_earlier_names_lead_to_the_same_profiles(earlier, name):
    profile = load_profile(earlier)
    assert profile == load_profile(f"{earlier}.yaml") == load_profile(name)
    nominal = float(earlier.rpartition("_")[2].removesuffix("bit"))
    assert nominal == pytest.approx(profile.resolve(profile.model).nominal_bits, abs=0.00501)
    assert earlier not in EARLIER_NAMES.values()


@pytest.mark.parametrize(("gone", "better"), REPLACED.items())
def test_names_of_profiles_that_have_left_are_refused_with_what_is_better(gone, better):
    for spec in (gone, f"{gone}.yaml"):
        with pytest.raises(ProfileError, match=f"^{spec}: profile must be one that is still shipped, .* {better} has"):
            load_profile(spec)
    left = json.loads(HELDOUT.read_text())["profiles"].get(gone)
    if left is not None:
        old = left.get("heldout_scores", {}).get("this profile") or left["evaluation"]
        stored_bits = float(gone.rpartition("_")[2].removesuffix("bit"))
        new = heldout_scores(better)["this profile"]
        assert new["kl_mean"] < old["kl_mean"] and new["stored_bits"] <= stored_bits + 0.005


def heldout_scores(name):
    return load_profile(name).provenance["heldout_scores"]


def test_published_names_need_no_folder():
    assert load_profile("llama31_3.25bit") == load_profile("published/llama31_3.25bit.yaml")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("qwen")])
def test_qwen_keys_are_rotated_with_the_offset_of_the_weights(name):
    profile = load_profile(name)
    assert profile.transforms.key_hadamard
    assert profile.transforms.key_offset == FROM_WEIGHTS
    assert profile.statics is None


def test_files_are_ascii_and_short():
    for name, path in shipped_profiles().items():
        text = path.read_text(encoding="ascii")
        assert len(text) < (5000 if name in CALIBRATED else 2000)
        assert max(map(len, text.splitlines())) <= 120
        assert yaml.safe_load(text)["version"] == 1
