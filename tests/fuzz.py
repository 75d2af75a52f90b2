"""Mutated profiles and statics: each is valid or a ValueError that names the file, in bounded time and memory.

``python -m tests.fuzz --seconds 300`` runs more than CI does; a case that is printed runs again by ``--first CASE
--cases 1``. A case depends on its number alone.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import json
import math
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from vllm_kvtuner.profile.load import load_profile, shipped_profiles
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.statics import load_statics

CASE_SECONDS = 30
MEMORY = 2 << 30
"""Bytes of address space that all cases share."""
MAX_PROBLEM = 20_000
"""Characters of one problem; a person reads them."""
LAYERS = 4
SHAPE = ModelShape("model", "LlamaForCausalLM", (LayerShape(2, 64),) * LAYERS)
STATICS = "fuzzed.safetensors"
GOOD_STATICS = "good.safetensors"

PROFILES = (
    """\
version: 1
model: {name: model, architecture: LlamaForCausalLM, num_layers: 4, num_kv_heads: 2, head_size: 64}
layers:
  0: K8V8
  1-2: K4V2
  3: K16V16
transforms:
  key_offset: true
  key_equalization: true
  value_hadamard: true
  overrides:
    0, 2: {value_hadamard: false, key_offset: false}
statics: good.safetensors
attend_cached_prefill: true
recent_window: 64
recent_window_bits: 8
recent_window_overrides: {0: 128, 1-2: 0}
sink_tokens: 4
provenance: {method: mutation, scores: {kl: 0.125, list: [1, 2.5, text]}}
""",
    "version: 1\nlayers: K4V4\ntransforms: {range_search: true}\n",
    "version: 1\nlayers: {0-1: K4V4, 2: K16V16, 3: K2V2}\nrecent_window_overrides: {0: 32, 2-3: 4096}\n"
    "sink_tokens: 16\n",
    "model:\n  name: m\n  architecture: A\n  num_layers: 2\n  num_kv_heads: [1, 0]\n  head_size: [64, 0]\n"
    "version: 1\nlayers: {0-1: K8V2}\n",
    "0: {nbits_key: 8, nbits_value: 4}\n'1': {nbits_key: 4, nbits_value: 2}\n2: {nbits_key: 16, nbits_value: 16}\n"
    "3: {nbits_key: 2, nbits_value: 2}\n",
)
VALUES = (
    *(
        "0",
        "-1",
        "1",
        "1024",
        "1025",
        "9" * 30,
        "9" * 5000,
        "0x7f",
        "0o17",
        "0b1",
        "1_000",
        "1:30",
        "1:" * 3000 + "1",
        "1:" * 3000 + "1.5",
    ),
    *(".nan", ".inf", "-.inf", "1e400", "1e-400", "0.5", "true", "no", "null", "~", "''", "=", "<<", "2026-01-01"),
    *("[]", "{}", "[1, 2]", "{a: b}", "{1: 2, 1: 3}", "[[]]", "- x", "? [a]\n: b", "|\n  text", ">-\n  text", "'"),
    *("&a [*a]", "*a", "&a x", "!!python/object/apply:os.getcwd []", "!!binary aGk=", "!!set {a}", "!x y", "%YAML 9.9"),
    *("[" * 50, "[" * 20_000, "{a: " * 20_000, "- " * 20_000, "? " * 5000, "[" * 3000 + "]" * 3000, "x" * 100_000),
    *("{a: " * 400 + "1" + "}" * 400, "[" * 200 + "]" * 200, "{? [a] : b}", "{? {a: b} : c}", "{[a]: b}"),
    *("K8V4", "k2v2", "K5V4", "K16V4", "K08V4", "K" + "8" * 5000 + "V4", "K٣V4", "0-3", "3-0", "0-1023", "0-999999"),
    *(
        "0,1,2,3",
        "0, 0",
        "0-0",
        ",",
        "1-",
        "-",
        "'0'",
        '"1-2"',
        "٣",
        "0" * 5000,
        "0-1023," * 30_000 + "1",
        ",".join(map(str, range(1024))),
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\n"',
        '"a\\nb"',
        "\ufeff",
        "\x00",
        "\x85",
        "\u2028",
        "\U0001f600",
        "\t",
        "\r",
        "# c",
        "---",
    ),
    *("../../etc", "/dev/zero", "/", ".", "a" * 300, "a/" * 3000, "good.safetensors", "...", "a: b: c", "<<: {a: b}"),
)
OBJECTS: tuple[Any, ...] = (
    *(
        0,
        1,
        2,
        3,
        4,
        8,
        16,
        17,
        64,
        1024,
        1025,
        4096,
        4097,
        -1,
        2**31,
        2**63,
        10**39,
        True,
        False,
        None,
        0.5,
        -0.0,
        1e308,
        math.nan,
        math.inf,
    ),
    *("", "K8V8", "K2V4", "K16V16", "K3V3", "0-3", "1-2", "0, 3", "3-1", "x", "\x1b[2J", "\u2028", "good.safetensors"),
    *("../good.safetensors", "a" * 400, b"bytes", datetime.date(2026, 1, 1), [], {}, [1, 0, 2, 2], {"0-3": "K4V4"}),
)
KEYS = (
    *(
        "version",
        "model",
        "layers",
        "transforms",
        "statics",
        "attend_cached_prefill",
        "provenance",
        "overrides",
        "name",
    ),
    *("architecture", "num_layers", "num_kv_heads", "head_size", "key_offset", "nbits_key", "nbits_value", "0", "1-2"),
    *("recent_window", "recent_window_bits", "recent_window_overrides", "sink_tokens"),
)
PLAUSIBLE = (
    *("K8V8", "K4V2", "K16V16", "true", "false", "0", "1", "2", "3", "4", "64", "0-3", "'1'", "text", "1.5", "[1, 2]"),
    *("8", "16", "{a: 1}", "null", '"0, 1"', "good.safetensors"),
)
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "X", 7, None)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four edits that know nothing of the format."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, end = sorted(rng.randint(0, len(out)) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[min(at, len(out) - 1)] = rng.randrange(256)
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            del out[at : at + rng.randint(1, 8)]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            out[at:at] = out[at:end] * rng.choice((1, 1, 2, 50))
        else:
            del out[at:end]
    return bytes(out)


def mutate_lines(rng: random.Random, text: str) -> str:
    """Lines twice, gone, moved, indented otherwise."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        at, other = (rng.randrange(len(lines) + 1) for _ in range(2))
        chosen = lines[min(at, len(lines) - 1)] if lines else ""
        kind = rng.randrange(4)
        if kind == 0:
            lines.insert(other, chosen)
        elif kind == 1:
            del lines[at : at + 1]
        elif kind == 2:
            lines.insert(other, " " * rng.randint(0, 4) + chosen.strip())
        else:
            lines.insert(at, f"{rng.choice(KEYS)}: {rng.choice(VALUES)}")
    return "\n".join(lines)


def mutate_tokens(rng: random.Random, text: str) -> str:
    """Words of the text replaced by values that are hard to read rightly."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        words = list(re.finditer(r"[\w.,-]+|[{}\[\]:]", text))
        if not words:
            return text
        word = rng.choice(words)
        new = rng.choice(rng.choice((VALUES, VALUES, PLAUSIBLE, PLAUSIBLE, KEYS)))
        text = text[: word.start()] + new + text[word.end() :]
    return text


def mutate_document(rng: random.Random, text: str) -> str:
    """Another value, key or shape somewhere in what the YAML says, so that the parser lets it through."""
    document = yaml.safe_load(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            break
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(OBJECTS[:-4])] = parent.pop(key)
        elif kind == 2 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = copy.deepcopy(parent[key])
        elif kind == 3:
            parent[key] = copy.deepcopy(rng.choice([other[name] for other, name in places]))
        else:
            parent[key] = copy.deepcopy(rng.choice(OBJECTS))
    return yaml.dump(document, Dumper=_PlainDumper, sort_keys=rng.random() < 0.5)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key (or index) of something in it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def alias_bomb(rng: random.Random) -> str:
    """Aliases that would expand to 10^9 entries or contain themselves, wherever a value may stand."""
    levels = [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(9)]
    return "\n".join(["version: 1", f"{rng.choice(KEYS)}:", *levels[: rng.randint(1, 9)], "layers: K4V4"])


def profile_case(rng: random.Random) -> bytes:
    """Bytes of a profile."""
    shipped = rng.choice(list(shipped_profiles().values())).read_text(encoding="utf-8")
    text = rng.choice((*PROFILES, *PROFILES, shipped))
    kind = rng.randrange(9)
    if kind == 0:
        return mutate_bytes(rng, text.encode())
    if kind == 1:
        text = mutate_lines(rng, text)
    elif kind == 2:
        text = mutate_lines(rng, mutate_tokens(rng, text))
    elif kind == 3:
        text = alias_bomb(rng) if rng.random() < 0.1 else mutate_tokens(rng, text)
    elif kind == 4:
        text = mutate_tokens(rng, text)
    else:
        text = mutate_document(rng, text)
    encoding = rng.choice(("utf-8",) * 60 + ("utf-16", "utf-8-sig", "utf-32", "latin-1"))
    return text.encode(encoding, "replace")


def statics_of(offset: float, factor: float, metadata: dict[str, str]) -> bytes:
    """A statics file with one number everywhere."""
    tensors = {f"layers.{n}.key_offset": np.full((2, 64), offset, np.float32) for n in range(LAYERS)}
    tensors |= {f"layers.{n}.key_equalization": np.full((2, 64), factor, np.float32) for n in range(LAYERS)}
    diagonal = np.eye(64, dtype=np.float16) * np.float16(min(factor, 1000.0))
    for layer in range(LAYERS):
        name = f"layers.{layer}.value_round_feedback"
        tensors |= {name: np.stack([diagonal, diagonal]), f"{name}_ranges_4bit": np.array([0.9, factor], np.float32)}
        metadata = {name: "none", **metadata}
    return safetensors.numpy.save(tensors, metadata)


def odd_statics(rng: random.Random) -> bytes:
    """A statics file that fits SHAPE, but for numbers and metadata that may be anything."""
    values = ("64", "0", "-2", "3", "9" * 20, "9" * 5000, "٣", "", "neox", "interleaved", "\x00", "x" * 1000)
    metadata = {key: rng.choice(values) for key in ("rotary_dim", "rope_style") if rng.random() < 0.3}
    if rng.random() < 0.1:
        metadata["layers.1.value_round_feedback"] = rng.choice((*values, "value_hadamard"))
    factor = rng.choice((1.0, 1.0, 1.0, 0.0, -1.0, np.nan, np.inf, 1e38))
    return statics_of(rng.choice((0.0, 3.0, 3.0, np.nan, -np.inf)), factor, metadata)


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """The header's entries changed, its length made to fit or not."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(header)) if header else "x"
        kind = rng.randrange(8)
        entry = header.get(name)
        if kind == 0:
            header.pop(name, None)
        elif kind == 1:
            header[rng.choice(("layers.9.key_offset", "layers.x.key_offset", "x" * 500, "", "layers.0\n.key"))] = entry
        elif kind == 2:
            header[name] = rng.choice((None, [], {}, 1, "x", [[[]]]))
        elif not isinstance(entry, dict):
            continue
        elif kind == 3:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 4:
            entry["shape"] = rng.choice(([], [128], [2, 64, 1], [2**63, 2], [2**32, 2**32], [0, 64], [-1, 64], [64, 2]))
        elif kind == 5:
            entry["data_offsets"] = rng.choice(
                ([0, 0], [0, 2**63], [512, 0], [-1, 511], [1, 513], [0], "x", [2**64, 1])
            )
        elif kind == 6:
            entry[rng.choice(("dtype", "shape", "data_offsets", "more"))] = None
        else:
            entry.pop(rng.choice(list(entry)), None) if entry else None
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = mutate_bytes(rng, text)
    length = rng.choice((len(text),) * 8 + (0, 1, 2**63, 2**64 - 1, len(text) + len(body), len(text) - 1))
    return max(0, length).to_bytes(8, "little") + text + body


def statics_case(rng: random.Random) -> bytes:
    """Bytes of a statics file."""
    data = odd_statics(rng)
    kind = rng.randrange(3)
    if kind == 0:
        return data
    return mutate_header(rng, data) if kind == 1 else mutate_bytes(rng, data)


def read_profile(folder: Path, content: bytes) -> None:
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    profile = load_profile(str(path))
    assert profile.nominal_bits > 0
    resolved = profile.resolve(SHAPE if profile.model is None else profile.model)
    assert resolved.nominal_bits <= resolved.stored_bits or not resolved.layers
    assert json.dumps(profile.provenance, default=str)
    if profile.statics is not None:
        load_statics(profile.statics, resolved)


def read_statics(folder: Path, content: bytes) -> None:
    path = folder / STATICS
    path.write_bytes(content)
    profile = folder / "statics.yaml"
    switches = "{key_offset: true, key_equalization: true, value_round_feedback: true}"
    profile.write_text(f"version: 1\nlayers: K4V4\ntransforms: {switches}\nstatics: {STATICS}\n")
    statics = load_statics(path, load_profile(str(profile)).resolve(SHAPE))
    for layer in statics.values():
        for tensor in (layer.key_offset, layer.key_equalization):
            assert tensor is not None and tensor.shape == (2, 64) and np.isfinite(tensor).all()
        assert (feedback := layer.value_round_feedback) is not None and len(feedback.ranges[4]) in (1, 2, 3)
        assert feedback.factors.shape == (2, 64, 64) and np.isfinite(feedback.factors).all()


KINDS: tuple[tuple[str, Callable[[random.Random], bytes], Callable[[Path, bytes], None]], ...] = (
    ("profile", profile_case, read_profile),
    ("profile", profile_case, read_profile),
    ("statics", statics_case, read_statics),
)


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run_case(number: int, folder: Path) -> str:
    """``valid`` or ``refused`` with the kind in front.

    Raises:
        AssertionError: neither, with the case.
    """
    rng = random.Random(number)
    kind, make, read = KINDS[number % len(KINDS)]
    content = make(rng)
    try:
        with alarm(CASE_SECONDS):
            read(folder, content)
    except ProfileError as error:
        wrong = [
            line
            for line in error.problems
            if not line.startswith(str(folder)) or not line.isprintable() or len(line) > MAX_PROBLEM
        ]
        if wrong or not error.problems:
            raise AssertionError(f"case {number}: problems {[line[:300] for line in wrong]}") from None
        return f"{kind} refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = "".join(traceback.format_exception(error)[-3:])[-2000:]
        raise AssertionError(f"case {number}: {kind} {content[:200]!r} gave {where}") from None
    return f"{kind} valid"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=1 << 62)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts: collections.Counter[str] = collections.Counter()
    failures, slowest, end = [], (0.0, -1), time.monotonic() + args.seconds
    number = args.first
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / GOOD_STATICS).write_bytes(statics_of(3.0, 1.0, {}))
        while number < args.first + args.cases and time.monotonic() < end:
            begin = time.monotonic()
            try:
                counts[run_case(number, Path(name))] += 1
            except AssertionError as failure:
                failures.append(str(failure))
                print(failure, file=sys.stderr)
            slowest = max(slowest, (time.monotonic() - begin, number))
            number += 1
    report = {"cases": number - args.first, **counts, "failures": len(failures)}
    report |= {"slowest seconds": round(slowest[0], 2), "slowest case": slowest[1]}
    report["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps(report))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
