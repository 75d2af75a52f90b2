"""``kvtuner doctor``: what would run on this machine for a model and why, what is wrong, and whether kernels are right.

Exit status 1 if vLLM would not serve the model with the profile here. An environment without torch is examined too, so
what needs torch is imported where it is used.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvtuner_tools import machine
from kvtuner_tools.machine import Section
from kvtuner_tools.profile_commands import resolve, tokens_that_fit
from vllm_kvtuner import envs
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PrecisionPair
from vllm_kvtuner.profile.load import AUTO
from vllm_kvtuner.profile.problems import ProfileError, UnknownProfileError, format_layers
from vllm_kvtuner.profile.profile import TransformSettings

if TYPE_CHECKING:
    import torch

    from vllm_kvtuner.kernels.contract import KernelSet
    from vllm_kvtuner.kernels.self_test_cases import Case
    from vllm_kvtuner.kernels.trial import Verdict

SCHEMA = "kvtuner-doctor/1"
DEFAULT_PAIRS = ("K8V8", "K4V4", "K2V2")
DEFAULT_HEAD_SIZE = 128
KV_HEADS, QUERY_HEADS = 2, 4
"""Of the self-test's layers: KV heads, and query heads of each."""
BATCH = (24, 4)
"""Requests of the self-test's largest batch, and query tokens of each at most."""
PROFILE, KERNELS = "profile ", "kernels"
"""How titles of sections on profiles begin, and the title of that on kernels."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that the same kernels serve.

    Args:
        layers: their indices; None where no model is known.
        pair: quantized.
        head_size: numbers per row.
        transforms: which are on.
        attention_sinks: whether the model has some.
    """

    layers: str | None
    pair: PrecisionPair
    head_size: int
    transforms: TransformSettings
    attention_sinks: bool = False

    def __str__(self) -> str:
        parts = [*self.transforms.names, *(["attention sinks"] if self.attention_sinks else [])]
        return f"{self.pair} of head size {self.head_size}" + (f" with {', '.join(parts)}" if parts else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or id of the model that would be served")
    parser.add_argument(
        "--profile",
        metavar="PROFILE",
        help="file, name of a shipped profile, pair or auto; by default KVTUNER_PROFILE, else auto (with MODEL) and "
        f"{', '.join(DEFAULT_PAIRS)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    # vLLM logs to what stdout is when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        sections = examine(args.model, args.profile)
    problems = _problems(sections)
    if args.json:
        print(json.dumps(report(sections), indent=2))
    else:
        print("\n\n".join(_format(section) for section in sections))
        print(f"\nproblems: {len(problems) or 'none'}")
        for problem, advice in problems:
            print(f"  {problem}\n    do: {advice}")
    return 1 if problems else 0


def report(sections: Sequence[Section]) -> dict[str, Any]:
    """What ``--json`` prints: a key for each section, lists of profiles and of kinds of layers."""
    problems = _problems(sections)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "serves": not problems,
        "problems": [{"problem": problem, "do": advice} for problem, advice in problems],
        "profiles": [],
        "kernels": [],
    }
    for section in sections:
        if section.title == KERNELS:
            found["kernels"] = [{"kind": kind, **_snake(fact)} for kind, fact in section.facts.items()]
        elif section.title.startswith(PROFILE):
            found["profiles"].append({"profile": section.title.removeprefix(PROFILE), **_snake(section.facts)})
        else:
            found |= _snake({section.title: section.facts})
    # JSON has no NaN, as which a kernel that stores nothing shows.
    return json.loads(json.dumps(found), parse_constant=lambda _: None)


def _snake(value: Any) -> Any:
    """Keys of mappings as identifiers: ``layers in vLLM's own cache`` is ``layers_in_vllms_own_cache``."""
    if not isinstance(value, dict):
        return value
    return {re.sub("[^a-z0-9]+", "_", key.lower().replace("'", "")): _snake(each) for key, each in value.items()}


def _problems(sections: Sequence[Section]) -> list[tuple[str, str]]:
    """Each once, with what to do about it."""
    return list(dict.fromkeys(problem for section in sections for problem in section.problems))


def examine(model: str | None, profile: str | None) -> list[Section]:
    """Everything the command prints.

    Args:
        model: folder or id, or None.
        profile: file, name or pair; None for KVTUNER_PROFILE, else auto and the default pairs.
    """
    software, card = machine.software(), machine.card()
    sections = [software, card, machine.plugin_registration()]
    spec = profile or envs.profile()
    groups: dict[Group, None] = {}
    # What --kv-cache-dtype kvtuner alone would serve, where there is a model to look for.
    specs = (AUTO, *DEFAULT_PAIRS) if model else DEFAULT_PAIRS
    for each in (spec,) if spec else specs:
        section, found = _profile(each, model, card.facts.get("free memory"))
        sections.append(section)
        groups |= dict.fromkeys(found)
    kernels = _kernels(list(groups), card) if machine.usable("torch") and "device" in card.facts else None
    chosen = [] if kernels is None else [text for fact in kernels.facts.values() for text in _chosen(fact)]
    used = any(text.startswith("cuda") for text in chosen)
    sections.append(machine.kernel_cache(used))
    if kernels is not None:
        sections.append(kernels)
    return sections


def _profile(spec: str, model: str | None, memory: int | None) -> tuple[Section, list[Group]]:
    section = Section(PROFILE + spec)
    try:
        profile, shape, resolved = resolve(spec, model, memory)
    except ProfileError as error:
        section.problems += [(problem, _advice(problem, error, model)) for problem in error.problems]
        return section, []
    section.facts["file"] = None if profile.source is None else str(profile.source)
    section.facts["model"] = None if shape is None else shape.name
    section.facts["nominal bits"] = profile.nominal_bits if resolved is None else resolved.nominal_bits
    if resolved is None:
        pairs = [profile.pairs] if isinstance(profile.pairs, PrecisionPair) else sorted(set(profile.pairs.values()))
        quantized = [pair for pair in pairs if pair.is_quantized]
        return section, [Group(None, pair, DEFAULT_HEAD_SIZE, profile.transforms) for pair in quantized]
    section.facts["stored bits"] = resolved.stored_bits
    section.facts["bytes per token"] = resolved.bytes_per_token
    section.facts["bytes per token in bf16"] = resolved.bf16_bytes_per_token
    weights = None if model is None else machine.weight_bytes(model)
    section.facts["weights' bytes"] = weights
    if memory is not None:
        section.facts["tokens in free memory without the weights"] = tokens_that_fit(
            max(0, memory - (weights or 0)), resolved.bytes_per_token
        )
    section.facts["statics"] = None if profile.statics is None else str(profile.statics)
    if resolved.profile.left_out:
        section.facts["without"] = "; ".join(resolved.profile.left_out)
    layers: dict[Group, list[int]] = {}
    for layer in resolved.layers:
        sinks = shape is not None and shape.attention_sinks
        group = Group(None, layer.pair, layer.shape.head_size, layer.transforms, sinks)
        layers.setdefault(group, []).append(layer.index)
    if unquantized := [layer.index for layer in resolved.layers if not layer.pair.is_quantized]:
        section.facts["layers in vLLM's own cache"] = format_layers(unquantized)
    return section, [
        dataclasses.replace(group, layers=format_layers(indices))
        for group, indices in layers.items()
        if group.pair.is_quantized
    ]


def _advice(problem: str, error: ProfileError, model: str | None) -> str:
    """What to do about a problem of a profile, or of the model that it is matched with."""
    if model is not None and problem.startswith((f"{model}:", f"{model}/")):
        return "give a folder with a config.json or a model's id; with HF_HUB_OFFLINE=1, one that is in the cache"
    if isinstance(error, UnknownProfileError):
        return "kvtuner profile list names the shipped profiles"
    if model is not None and model in problem:
        return "give a profile of this model: kvtuner profile list names the shipped ones, kvtuner calibrate makes one"
    return "correct what the line names; kvtuner profile check shows the profile alone"


def _kernels(groups: Sequence[Group], card: Section) -> Section:
    """Which kernels serve each group, and how far they are off."""
    import torch

    on_gpu = card.facts["device"] != "cpu"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    section = Section(KERNELS)
    verdict = _prove(groups, device, section) if on_gpu else None
    for group in groups:
        title = str(group)
        fact: dict[str, Any] = {} if group.layers is None else {"layers": group.layers}
        section.facts[title] = fact
        if on_gpu and verdict is None:
            fact["self-test"] = "not run"
            continue
        try:
            fact |= _choices(group, device, verdict)
        except ValueError as error:
            fact["self-test"] = "not run"
            variable = str(error).partition(" ")[0]
            section.problems.append((str(error), f"unset {variable}, or correct what it names"))
            continue
        _self_test(section, title, group, device)
    return section


def _case(group: Group) -> "Case":
    """Layers such as the group's, with few heads and batches: decodes of one token and of several."""
    import torch

    from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits
    from vllm_kvtuner.kernels.self_test_cases import Case
    from vllm_kvtuner.pages.layout import PageLayout

    size = group.head_size
    layout = PageLayout(group.pair, size, BLOCK_SIZE_MULTIPLE)
    sinks = torch.bfloat16 if group.attention_sinks else None
    shape = AttentionShape(QUERY_HEADS * KV_HEADS, KV_HEADS, size, size**-0.5, sinks=sinks)
    return Case(layout, shape, BatchLimits(*BATCH), transforms=group.transforms.names)


def _prove(groups: Sequence[Group], device: "torch.device", section: Section) -> "Verdict | None":
    """What an engine's start would find out of the CUDA kernels on this card; None where it would end in an error."""
    from vllm_kvtuner.kernels import gpu

    try:
        return gpu.prove([_case(group) for group in groups], device)
    except (ValueError, RuntimeError) as error:
        section.problems.append((str(error), "correct what the line names, or set KVTUNER_DECODE_KERNEL=triton"))
        return None


def _choices(group: Group, device: "torch.device", verdict: "Verdict | None") -> dict[str, str]:
    import torch

    from vllm_kvtuner.kernels import choice
    from vllm_kvtuner.kernels.cpu import kernels as cpu
    from vllm_kvtuner.kernels.self_test_cases import random_transforms

    if verdict is None:
        kernels = cpu.choice(group.head_size)
        return {"decode": kernels, "store and gather": kernels}
    case = _case(group)
    capability = choice.device_capability(device)
    transforms = random_transforms(case.transforms, case, torch.device("cpu"))
    found: dict[str, str] = {}
    if choice.may_take_cuda(case.layout, capability):
        found["CUDA kernels"] = f"self-test {verdict}"

    def failure() -> str | None:
        return verdict.failure

    has_sinks = group.attention_sinks
    decode = str(choice.choose_decode(case.layout, transforms, 0.0, capability, failure=failure, has_sinks=has_sinks))
    rows = str(choice.choose_rows(case.layout, capability, failure))
    if group.transforms.key_offset and decode.startswith(choice.CUDA):
        decode += f" ({choice.TRITON} for a model whose rotation is not proportional to the position, or that takes "
        decode += "pictures under M-RoPE)"
        if rows.startswith(choice.CUDA):
            rows += f" ({choice.TRITON} for a model that takes pictures under M-RoPE)"
    return {**found, "decode": decode, "store and gather": rows}


def _chosen(fact: dict[str, Any]) -> list[str]:
    return [fact[key] for key in ("decode", "store and gather") if key in fact]


def _serving(case: "Case", device: "torch.device") -> "KernelSet":
    """What serves such a layer on the device."""
    from vllm_kvtuner.kernels.cpu.kernels import cpu_kernels
    from vllm_kvtuner.kernels.gpu import GpuKernels

    if device.type == "cpu":
        return cpu_kernels(case.shape, case.span)
    return GpuKernels(case.shape, case.span, case.limits, device, case.write_lse, case.dtype)


def _self_test(section: Section, title: str, group: Group, device: "torch.device") -> None:
    from vllm_kvtuner.kernels import self_test

    fact, case = section.facts[title], _case(group)
    try:
        errors = self_test.measure(case, _serving(case, device), device)
    except Exception as error:  # compilers, drivers and launches fail in their own ways, each of them an answer
        fact["self-test"] = "failed"
        advice = "run it again with KVTUNER_DECODE_KERNEL=triton; if that passes, serve with it and report the problem"
        section.problems.append((f"{title}: the self-test stopped with {type(error).__name__}: {error}", advice))
        return
    fact["self-test"] = "passed" if errors.passed else "failed"
    fact["errors"] = dataclasses.asdict(errors)
    if not errors.passed:
        advice = "do not serve this profile on this card; report the problem with the output of kvtuner doctor --json"
        section.problems.append((f"{title}: the self-test's results are wrong ({_errors(fact['errors'])})", advice))


def _errors(errors: dict[str, float]) -> str:
    feedback = f", round feedback {errors['feedback']:.1%}" if errors["feedback"] else ""
    return (
        f"largest errors: store {errors['store']:.2f} steps{feedback}, gather {errors['gather']:.1e} and decode "
        f"{errors['decode']:.1e} of the largest number; {errors['stray']} numbers astray; {errors['seconds']:.3f} s"
    )


def _format(section: Section) -> str:
    rows = [(name, _text(name, value)) for name, value in section.facts.items()]
    width = max((len(name) for name, value in rows if "\n" not in value), default=0)
    lines = [f"  {name}{value}" if "\n" in value else f"  {name:{width}}  {value}" for name, value in rows]
    return "\n".join([section.title, *lines, *(f"  problem: {problem}" for problem, _ in section.problems)])


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        inner = {key: _errors(each) if isinstance(each, dict) else each for key, each in value.items()}
        return "".join(f"\n    {key:17} {each}" for key, each in inner.items())
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and name.endswith(("memory", "space", "weights' bytes")):
        return f"{value / 2**30:.2f} GiB"
    return f"{value:,}" if isinstance(value, int) else str(value)
