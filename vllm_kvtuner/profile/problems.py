"""What every reader of a user's file shares: strict YAML, layer ranges, and errors that come all at once.

A problem is one line, ``<file>: <key> <rule>, but got <value>``.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_LAYERS = 1024
"""Layer count above which a range is a typing error; bounds what a range can expand to."""

MAX_BYTES = 1 << 18
"""Size above which a file is no profile; bounds the time that reading one takes."""
MAX_KEYS = 4096
"""Keys of one mapping, likewise."""
MAX_DIGITS = 40
"""Digits of an integer, likewise."""
MAX_PROBLEM = 4000
"""Characters above which a problem's middle is left out."""

_INTEGER = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
_RANGE = re.compile(r"([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?")


class ProfileError(ValueError):
    """Everything that is wrong with a profile or a file beside it.

    Args:
        problems: one line each.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(map(_one_line, problems))
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class UnknownProfileError(ProfileError):
    """Neither a file, nor a pair, nor a shipped profile."""


class Problems:
    """Collects the problems of one file.

    Args:
        source: the file as the user wrote it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, key: str, rule: str, got: str) -> None:
        self.lines.append(f"{self.source}: {key} {rule}, but got {got}")

    def raise_if_any(self) -> None:
        if self.lines:
            raise ProfileError(self.lines)

    def check_keys(self, key: str, value: Any, known: tuple[str, ...]) -> bool:
        """Report a value that is no mapping and every key outside ``known``; True if it is a mapping."""
        if not isinstance(value, Mapping):
            self.add(key, f"must be a mapping with keys of {', '.join(known)}", show(value))
            return False
        for name in value:
            if name not in known:
                self.add(key, f"must only have the keys {', '.join(known)}", show(name) + suggest(str(name), known))
        return True


def _one_line(problem: str) -> str:
    """A problem as a terminal may show it: names and values of a file may hold anything."""
    if len(problem) > MAX_PROBLEM:
        problem = f"{problem[: MAX_PROBLEM // 2]}...{problem[-MAX_PROBLEM // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in problem)


def show(value: Any) -> str:
    """The value as an error quotes it, cut to a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, anchors, aliases, merges, dates, base 60 and duplicate keys.

    What a profile says is what it shows, and reading it takes bounded time.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        for what in ("anchor", "tag"):
            if getattr(event, what, None) is not None:
                raise yaml.YAMLError(f"{what} {getattr(event, what)!r} in line {event.start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if len(node.value) > MAX_KEYS:
            raise yaml.YAMLError(f"more than {MAX_KEYS} keys in the mapping of line {node.start_mark.line + 1}")
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key that is a list or a mapping in line {line}")
            if key_node.tag == _MERGE:
                raise yaml.YAMLError(f"the merge key << in line {line}")
            if key_node.tag == _INTEGER and not re.fullmatch("0|-?[1-9][0-9]*", key_node.value):
                raise yaml.YAMLError(f"the key {key_node.value!r}, no plain decimal number, in line {line}")
            if key_node.value in seen:
                raise yaml.YAMLError(f"the key {key_node.value!r} a second time in line {line}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        if ":" in node.value or (node.tag == _INTEGER and len(node.value) > MAX_DIGITS):
            raise yaml.YAMLError(
                f"the number {show(node.value)} of base 60 or many digits in line {node.start_mark.line + 1}"
            )
        return self.construct_yaml_int(node) if node.tag == _INTEGER else self.construct_yaml_float(node)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in (_INTEGER, _FLOAT):
    _PlainLoader.add_constructor(_tag, _PlainLoader.construct_number)


def read_yaml(path: Path, source: str) -> dict[Any, Any]:
    """Read a file that holds one YAML mapping. Executes nothing and constructs plain data only.

    Args:
        path: the file.
        source: the file as the user wrote it, for errors.

    Raises:
        ProfileError: not readable, too large, not UTF-8, not plain YAML (tags, anchors and duplicate keys included), no
            mapping.
    """
    problems = Problems(source)
    content, document = b"", None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        problems.add("the file", "must be readable", str(error.strerror))
    if len(content) > MAX_BYTES:
        problems.add("the file", f"must have at most {MAX_BYTES:,} bytes", "more")
    problems.raise_if_any()
    try:
        document = _PlainLoader(content.decode("utf-8-sig")).get_single_data()
    except UnicodeDecodeError as error:
        problems.add("the file", "must be UTF-8 text", f"byte {error.object[error.start]:#x} at offset {error.start}")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        rule = "must be plain YAML (no tags, anchors or duplicate keys)"
        problems.add("the file", rule, " ".join(str(error).split()))
    else:
        if not isinstance(document, dict):
            problems.add("the file", "must hold a mapping", show(document))
    problems.raise_if_any()
    assert isinstance(document, dict)
    return document


def parse_layers(key: Any, num_layers: int | None) -> list[int]:
    """Layer indices of ``4``, ``"1-31"`` or ``"4, 8, 12-14"``, in the order written.

    Args:
        key: a key of a ``layers`` mapping.
        num_layers: layers of the model if known.

    Raises:
        ValueError: ``<rule>, but got <value>``: not of that form, reversed, out of range or repeated.
    """
    limit = MAX_LAYERS if num_layers is None else num_layers
    layers: dict[int, None] = {}
    for part in str(key).split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"must be a layer, a range or a list of both such as 4, 8, 12-14, but got {show(key)}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"must give a range from its lower to its upper layer, but got {first}-{last}")
        if last >= limit:
            raise ValueError(f"must lie within layers 0-{limit - 1}, but got {format_layers(range(first, last + 1))}")
        if repeated := [layer for layer in range(first, last + 1) if layer in layers]:
            raise ValueError(f"must name a layer once, but got {format_layers(repeated)} again")
        layers |= dict.fromkeys(range(first, last + 1))
    return list(layers)


def format_layers(layers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7: the form that :func:`parse_layers` reads."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def expand_layers(
    problems: Problems, key: str, mapping: Mapping[Any, Any], num_layers: int | None
) -> dict[int, tuple[str, Any]]:
    """Each layer's written key and value in a mapping from layer ranges; ranges that are wrong or overlap are reported.

    Args:
        problems: collects them.
        key: where the mapping stands, such as ``layers``.
        mapping: from layer, range or list to anything.
        num_layers: layers of the model if known.
    """
    expanded: dict[int, tuple[str, Any]] = {}
    for written, value in mapping.items():
        try:
            layers = parse_layers(written, num_layers)
        except ValueError as error:
            problems.lines.append(f"{problems.source}: {key}.{written} {error}")
            continue
        if repeated := [layer for layer in layers if layer in expanded]:
            others = ", ".join(dict.fromkeys(f"{key}.{expanded[layer][0]}" for layer in repeated))
            rule = "must only name layers that no other key names"
            problems.add(f"{key}.{written}", rule, f"{format_layers(repeated)} (also in {others})")
        expanded.update({layer: (str(written), value) for layer in layers if layer not in expanded})
    return expanded
