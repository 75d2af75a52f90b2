"""The import picture: rooms, the arrows between them, and whether any of them runs up or in a circle.

    python -m kvtuner_tools.structure --check                              # exit status 1 if one does
    python -m kvtuner_tools.structure --picture docs/design/rooms.svg

Rooms and floors are those of import-linter's contract of type ``layers`` in pyproject.toml; who imports whom is read
from the source by grimp, imports inside functions and for type checkers included.
"""

import argparse
import ast
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp

from kvtuner_tools.structure_picture import draw

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvtuner_tools", "vllm_kvtuner")


@dataclass(frozen=True)
class Structure:
    """Who imports whom.

    Args:
        floors: rooms from the top down; those of one floor do not know each other.
        files: modules by room.
        summaries: what each room is, in the first words of its docstring.
        arrows: how many imports of one room's files lead to another's.
        circles: modules that import each other, directly or not; one entry a circle.
    """

    floors: tuple[tuple[str, ...], ...]
    files: Mapping[str, Collection[str]]
    summaries: Mapping[str, str]
    arrows: Mapping[tuple[str, str], int]
    circles: tuple[tuple[str, ...], ...]

    @property
    def upward(self) -> list[tuple[str, str]]:
        """Arrows to a room that does not lie below."""
        floor = {room: index for index, rooms in enumerate(self.floors) for room in rooms}
        return [(source, target) for source, target in self.arrows if floor[target] <= floor[source]]

    def lines(self) -> list[str]:
        """Everything in figures, one fact a line."""
        files = sum(len(modules) for modules in self.files.values())
        return [
            f"rooms           {len(self.files)} on {len(self.floors)} floors, {files} files",
            f"arrows          {len(self.arrows)}, of {sum(self.arrows.values())} imports",
            f"upward arrows   {len(self.upward)}",
            *(f"  {source} -> {target}" for source, target in self.upward),
            f"circles         {len(self.circles)}",
            *(f"  {' <-> '.join(circle)}" for circle in self.circles),
        ]


def read_structure(root: Path = ROOT) -> Structure:
    """Of the project in a folder.

    Raises:
        ValueError: pyproject.toml has no contract of type ``layers``, or a module lies in none of its rooms.
    """
    floors = _floors(root / "pyproject.toml")
    rooms = [room for floor in floors for room in floor]
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    files: dict[str, list[str]] = {room: [] for room in rooms}
    room_of = {}
    for module in sorted(graph.modules - {"vllm_kvtuner"}):  # the root only holds rooms
        found = [room for room in rooms if module == room or module.startswith(f"{room}.")]
        if not found:
            raise ValueError(f"{module} lies in no room of import-linter's layers in pyproject.toml")
        room_of[module] = found[0]
        files[found[0]].append(module)
    imports = {module: graph.find_modules_directly_imported_by(module) & set(room_of) for module in room_of}
    arrows = Counter(
        (room_of[source], room_of[target])
        for source, targets in imports.items()
        for target in targets
        if room_of[source] != room_of[target]
    )
    summaries = {room: _summary(root, room) for room in rooms}
    return Structure(floors, files, summaries, dict(sorted(arrows.items())), _circles(imports))


def _floors(pyproject: Path) -> tuple[tuple[str, ...], ...]:
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    layers = next((each["layers"] for each in contracts if each["type"] == "layers"), None)
    if layers is None:
        raise ValueError(f"{pyproject} must have a contract of type 'layers' for import-linter, but has none")
    return tuple(tuple(room.strip() for room in layer.split("|")) for layer in layers)


def _summary(root: Path, room: str) -> str:
    place = root / room.replace(".", "/").replace("kvtuner_tools", "tools")
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    return re.split(r"[.:;](?:\s|$)", docstring.replace("``", ""))[0]


def _circles(imports: Mapping[str, Collection[str]]) -> tuple[tuple[str, ...], ...]:
    """Strongly connected modules, found as Tarjan does."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in sorted(imports[module]):
            if target not in number:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == number[module]:
            first = stack.index(module)
            if len(circle := stack[first:]) > 1:
                circles.append(tuple(sorted(circle)))
            del stack[first:]

    for module in sorted(imports):
        if module not in number:
            visit(module)
    return tuple(sorted(circles))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtuner_tools.structure", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 if an arrow runs up or in a circle")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw an SVG")
    options = parser.parse_args(arguments)
    structure = read_structure()
    print("\n".join(structure.lines()))
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(draw(structure.floors, structure.files, structure.summaries, structure.arrows))
    return 1 if options.check and (structure.upward or structure.circles) else 0


if __name__ == "__main__":
    raise SystemExit(main())
