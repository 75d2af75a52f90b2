"""Write the profiles that a calibration ends in."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from kvtuner_tools.calibration.artifacts import SensitivityTable, read_statics
from kvtuner_tools.calibration.outcome import (
    PROFILE_FILE,
    PROFILE_ORIGIN,
    Heldout,
    Scored,
    SearchResult,
    short_name,
    uniform_file,
)
from kvtuner_tools.calibration.verdict import Verdict, judge
from kvtuner_tools.results import write_bytes
from vllm_kvtuner import __version__
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import SCHEMA_VERSION, RecentWindow, TransformSettings


def write_profiles(
    out: Path,
    table: SensitivityTable,
    statics: Path,
    result: SearchResult,
    heldout: Heldout,
    recent_window: RecentWindow | None,
    weights: str | None = None,
) -> Verdict:
    """Write the searched profile, and beside it the uniform setting that it is compared with.

    Uniform profiles of earlier runs in the folder are removed.

    Args:
        out: the output folder.
        table: transforms of every layer, and what they were chosen on.
        statics: the calibration's statics file; read only where it is used.
        result: the chosen setting, and how it was found.
        heldout: its scores and those of the settings that it is compared with.
        recent_window: the one that all of this was measured with.
        weights: digest of the model's; None where they are not on this machine.

    Returns:
        Which of them to serve.

    Raises:
        ProfileError: a profile would not load; it was not written then.
    """
    verdict = judge(heldout, result.max_bits)
    if weights is not None:
        table = replace(table, model={**table.model, "weights": weights})
    settings = {PROFILE_FILE: heldout.chosen}
    if (rival := heldout.rival(result.max_bits)) is not None:
        settings[uniform_file(rival)] = rival
    for old in out.glob("uniform_K*V*.yaml"):
        if old.name not in settings:
            old.unlink()
            old.with_name(statics_name(old)).unlink(missing_ok=True)
    for name, setting in settings.items():
        given = provenance(setting, table, result, heldout, verdict)
        write_profile(out / name, setting.pairs, table, statics, recent_window, given)
    return verdict


def statics_name(profile: Path) -> str:
    """Name of the statics file beside a profile."""
    return f"{profile.stem}.statics.safetensors"


def write_profile(
    path: Path,
    pairs: Mapping[int, PrecisionPair],
    table: SensitivityTable,
    statics: Path,
    recent_window: RecentWindow | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write the profile, and the statics beside it where a layer uses them, each at once or not at all.

    The same inputs give the same bytes: nothing in it tells when or how fast it was made.

    Args:
        path: the profile.
        pairs: of every layer.
        table: transforms of every layer, and the model.
        statics: the calibration's statics file; read only where it is used.
        recent_window: of every quantized layer; None for none.
        provenance: how the profile was made, as plain values.

    Raises:
        ProfileError: the profile would not load; it was not written then.
    """
    transforms = {layer.index: layer.transforms for layer in table.layers if pairs[layer.index].is_quantized}
    document: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "model": {**table.model, "name": short_name(table.model["name"])},
        "layers": _by_pair(pairs),
        "transforms": _transforms(transforms),
    }
    if recent_window is not None:
        document |= {"recent_window": recent_window.tokens, "recent_window_bits": recent_window.bits}
        if recent_window.sink_tokens:
            document["sink_tokens"] = recent_window.sink_tokens
    if any(each.needs_statics for each in transforms.values()):
        document["statics"] = statics_name(path)
        write_bytes(path.with_name(statics_name(path)), read_statics(statics))
    document["provenance"] = dict(provenance)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    write_bytes(path, text.encode(), check=lambda file: load_profile(str(file)))


def provenance(
    setting: Scored, table: SensitivityTable, result: SearchResult, heldout: Heldout, verdict: Verdict
) -> dict[str, Any]:
    """How a profile was made and what it scored, as plain values."""
    is_searched = setting is heldout.chosen
    reference = heldout.chosen.quality
    texts = {"sensitivity": table.data, "search": result.data, "heldout": heldout.data}
    texts = {name: data for name, data in texts.items() if data}
    scores = {PROFILE_ORIGIN: _scores(setting)}
    for each in heldout.settings:
        if each is not setting:
            scores["searched profile" if each is heldout.chosen else each.origin] = _scores(each)
    return {
        "source": f"kvtuner calibrate, vllm-kvtuner {__version__}",
        "budget": result.budget,
        "nominal_bits": round(setting.nominal_bits, 4),
        "stored_bits": round(setting.stored_bits, 4),
        "found_by": result.chosen.origin if is_searched else setting.origin,
        "verdict": verdict.text,
        "versions": dict(table.versions),
        "seeds": {"sampling": table.seed, "search": result.seed},
        "search": {"sampler": result.sampler, "study": result.study, "trials": dict(result.trials)},
        "data": {name: {**data, "source": short_name(data["source"])} for name, data in texts.items()},
        "heldout_scores": {
            "tokens": reference.num_tokens,
            "bf16": {"nominal_bits": 16.0, "stored_bits": 16.0, "perplexity": _round(reference.perplexity_reference)},
            **scores,
        },
    }


def _scores(each: Scored) -> dict[str, float]:
    quality = each.quality
    return {
        "nominal_bits": round(each.nominal_bits, 4),
        "stored_bits": round(each.stored_bits, 4),
        "kl_mean": _round(quality.kl_mean),
        "kl_stderr": _round(quality.kl_stderr),
        "kl_p99": _round(quality.kl_p99),
        "top1_agreement": _round(quality.top1_agreement),
        "perplexity": _round(quality.perplexity),
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _by_pair(pairs: Mapping[int, PrecisionPair]) -> dict[str, str]:
    """Runs of layers with one pair, in the model's order."""
    runs: list[tuple[list[int], PrecisionPair]] = []
    for layer, pair in sorted(pairs.items()):
        if runs and runs[-1][1] == pair and runs[-1][0][-1] == layer - 1:
            runs[-1][0].append(layer)
        else:
            runs.append(([layer], pair))
    return {format_layers(layers): pair.name for layers, pair in runs}


def _transforms(transforms: Mapping[int, TransformSettings]) -> dict[str, Any]:
    """The settings of most layers, and the others' as overrides, the same settings together."""
    if not transforms:
        return {}
    most = Counter(transforms.values()).most_common(1)[0][0]
    document: dict[str, Any] = dict.fromkeys(most.names, True)
    others: dict[TransformSettings, list[int]] = {}
    for layer, each in transforms.items():
        if each != most:
            others.setdefault(each, []).append(layer)
    if others:
        document["overrides"] = {format_layers(layers): _switches(each, most) for each, layers in others.items()}
    return document


def _switches(settings: TransformSettings, default: TransformSettings) -> dict[str, bool]:
    """What has to be written to get ``settings`` where ``default`` holds."""
    return {name: value for name, value in vars(settings).items() if value != getattr(default, name)}
