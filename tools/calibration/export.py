"""Write the profile that a calibration ends in."""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvtuner_tools.calibration.artifacts import SensitivityTable, read_statics
from kvtuner_tools.calibration.outcome import Heldout, Scored, SearchResult, short_name, verdict
from vllm_kvtuner import __version__
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import SCHEMA_VERSION, RecentWindow, TransformSettings


def write_profile(
    path: Path,
    table: SensitivityTable,
    statics: Path,
    result: SearchResult,
    heldout: Heldout,
    recent_window: RecentWindow | None,
) -> None:
    """Write the profile, and the statics beside it where a layer uses them, each at once or not at all.

    The same inputs give the same bytes: nothing in it tells when or how fast it was made.

    Args:
        path: the profile; ``<stem>.statics.safetensors`` is the name of its statics.
        table: transforms of every layer, and what they were chosen on.
        statics: the calibration's statics file; read only where it is used.
        result: the chosen setting, and how it was found.
        heldout: its scores and those of the uniform settings.
        recent_window: the one that all of this was measured with.

    Raises:
        ProfileError: the profile would not load; nothing was written then.
    """
    pairs = result.chosen.pairs
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
        name = f"{path.stem}.statics.safetensors"
        _write(path.with_name(name), read_statics(statics))
        document["statics"] = name
    document["provenance"] = provenance(table, result, heldout)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    _write(path, text.encode(), check=True)


def provenance(table: SensitivityTable, result: SearchResult, heldout: Heldout) -> dict[str, Any]:
    """How a profile was made and what it scored, as plain values."""
    chosen = result.chosen
    reference = heldout.chosen.quality
    texts = {"sensitivity": table.data, "search": result.data, "heldout": heldout.data}
    scores = {each.origin: _scores(each) for each in heldout.settings}
    return {
        "source": f"kvtuner calibrate, vllm-kvtuner {__version__}",
        "budget": result.budget,
        "nominal_bits": round(chosen.nominal_bits, 4),
        "stored_bits": round(chosen.stored_bits, 4),
        "found_by": chosen.origin,
        "verdict": verdict(heldout, result.max_bits),
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


def _write(path: Path, data: bytes, *, check: bool = False) -> None:
    """Write a file at once or not at all; with ``check``, only if it loads as a profile."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix, delete=False
    ) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if check:
                load_profile(file.name)
            # A temporary file is private to its owner; the finished one should be as readable as any other.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
