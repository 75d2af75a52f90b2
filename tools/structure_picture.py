"""The import picture as SVG: a staircase of rooms, so that every import is a way down and then right."""

from collections.abc import Collection, Mapping, Sequence
from xml.sax.saxutils import escape

BOX_WIDTH, BOX_HEIGHT = 104, 30
COLUMN, ROW = 72, 52
"""From one room to the next, in pixels."""
MARGIN = 24
TEXT_WIDTH = 330
"""Right of the last room's box."""
FOOT = 44
FONT = "font-family='Helvetica, Arial, sans-serif'"
DOWN, UP = ("#3b6ea5", "#a9c1dc"), ("#c0392b", "#e6a49d")
"""Colours of a count, and of the lines that lead to it."""


def draw(
    floors: Sequence[Sequence[str]],
    files: Mapping[str, Collection[str]],
    summaries: Mapping[str, str],
    arrows: Mapping[tuple[str, str], int],
) -> str:
    """The picture's text.

    Args:
        floors: rooms from the top down.
        files: modules by room.
        summaries: what each room is, in a few words.
        arrows: number of imports by room that imports and room that is imported.
    """
    rooms = [room for floor in floors for room in floor]
    place = {room: index for index, room in enumerate(rooms)}
    width = 2 * MARGIN + (len(rooms) - 1) * COLUMN + BOX_WIDTH + TEXT_WIDTH
    height = 2 * MARGIN + len(rooms) * ROW + FOOT
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' "
        f"role='img' {FONT} font-size='13'>",
        "<title>Rooms and the imports between them</title>",
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
        *_bands(floors, place, width),
        *(_line(place[source], place[target]) for source, target in arrows),
        *(_count(place[source], place[target], count) for (source, target), count in arrows.items()),
        *(_box(place[room], room, len(files[room]), summaries[room]) for room in rooms),
        *_legend(height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend(height: int) -> list[str]:
    lines = (
        "From a room down and then right: which rooms it imports, and in how many places.",
        "Rooms of one band do not know each other. A way up would be drawn in red.",
    )
    first = height - MARGIN - 18 * (len(lines) - 1)
    return [
        f"<text x='{MARGIN}' y='{first + 18 * index}' fill='#555555'>{line}</text>" for index, line in enumerate(lines)
    ]


def _corner(index: int) -> tuple[int, int]:
    """Top left of a room's box."""
    return MARGIN + index * COLUMN, MARGIN + index * ROW + (ROW - BOX_HEIGHT) // 2


def _bands(floors: Sequence[Sequence[str]], place: Mapping[str, int], width: int) -> list[str]:
    return [
        f"<rect x='0' y='{MARGIN + place[floor[0]] * ROW}' width='{width}' height='{len(floor) * ROW}' fill='#f3f6fa'/>"
        for index, floor in enumerate(floors)
        if index % 2 == 0
    ]


def _line(source: int, target: int) -> str:
    x, y = _corner(source)
    end_x, end_y = _corner(target)
    start_y = y + BOX_HEIGHT if target > source else y
    end_x = end_x if target > source else end_x + BOX_WIDTH
    x, end_y = x + COLUMN // 3, end_y + BOX_HEIGHT // 2
    (color, line), back = (DOWN, -7) if target > source else (UP, 7)
    head = f"M{end_x},{end_y} l{back},-4 v8 z"
    return f"<path d='M{x},{start_y} V{end_y} H{end_x}' fill='none' stroke='{line}'/><path d='{head}' fill='{color}'/>"


def _count(source: int, target: int, count: int) -> str:
    x, y = _corner(source)[0] + COLUMN // 3, _corner(target)[1] + BOX_HEIGHT // 2
    color, _ = DOWN if target > source else UP
    return (
        f"<circle cx='{x}' cy='{y}' r='11' fill='#ffffff' stroke='{color}'/>"
        f"<text x='{x}' y='{y + 4}' text-anchor='middle' font-size='11' fill='{color}'>{count}</text>"
    )


def _box(index: int, room: str, files: int, summary: str) -> str:
    x, y = _corner(index)
    name = room.rpartition(".")[2]
    middle = y + BOX_HEIGHT // 2 + 4
    return (
        f"<rect x='{x}' y='{y}' width='{BOX_WIDTH}' height='{BOX_HEIGHT}' rx='5' fill='#1f3a5f'/>"
        f"<text x='{x + BOX_WIDTH // 2}' y='{middle}' text-anchor='middle' fill='#ffffff'>{escape(name)}</text>"
        f"<text x='{x + BOX_WIDTH + 10}' y='{middle}' fill='#222222'>{escape(summary)} "
        f"<tspan fill='#777777'>({files} file{'' if files == 1 else 's'})</tspan></text>"
    )
