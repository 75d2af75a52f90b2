"""The import picture: what it counts, and that a way up shows."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_tools import structure
from kvtuner_tools.structure import Structure
from kvtuner_tools.structure_picture import UP, draw

FLOORS = (("top",), ("left", "right"), ("bottom",))
FILES = {"top": ["top.a", "top.b"], "left": ["left"], "right": ["right"], "bottom": ["bottom"]}
SUMMARIES = {"top": "The top", "left": "A <room>", "right": "Another", "bottom": "The last"}


def make(**arrows):
    return Structure(FLOORS, FILES, SUMMARIES, {tuple(key.split("_")): count for key, count in arrows.items()}, ())


def test_ways_up_and_along_a_floor_are_counted():
    found = make(top_left=2, top_bottom=1, bottom_top=1, left_right=3)
    assert found.upward == [("bottom", "top"), ("left", "right")]
    assert found.lines() == [
        "rooms           4 on 3 floors, 5 files",
        "arrows          4, of 7 imports",
        "upward arrows   2",
        "  bottom -> top",
        "  left -> right",
        "circles         0",
    ]


@pytest.mark.parametrize(
    ("imports", "circles"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, ()),
        ({"a": ["b", "c"], "b": ["c"], "c": ["b"]}, (("b", "c"),)),
        ({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["e", "a"], "e": ["d"]}, (("a", "b", "c"), ("d", "e"))),
    ],
)
def test_circles_are_found(imports, circles):
    assert structure._circles(imports) == circles


def test_a_way_up_is_red():
    down, up = make(top_left=2, left_bottom=7), make(top_left=2, bottom_left=7)
    pictures = [draw(each.floors, each.files, each.summaries, each.arrows) for each in (down, up)]
    assert [UP[0] in picture for picture in pictures] == [False, True]
    assert all(">7</text>" in picture and "A &lt;room&gt;" in picture for picture in pictures)


def test_a_module_outside_of_all_rooms_is_refused(tmp_path):
    contract = '[[tool.importlinter.contracts]]\ntype = "layers"\nlayers = ["kvtuner_tools", "vllm_kvtuner.pages"]\n'
    (tmp_path / "pyproject.toml").write_text(contract)
    with pytest.raises(ValueError, match=r"vllm_kvtuner\.\w+ lies in no room of import-linter's layers"):
        structure.read_structure(tmp_path)


def test_without_a_contract_of_layers_there_are_no_rooms(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[[tool.importlinter.contracts]]\ntype = "forbidden"\n')
    with pytest.raises(ValueError, match=r"pyproject\.toml must have a contract of type 'layers'"):
        structure.read_structure(tmp_path)


def test_the_command_prints_and_draws(tmp_path):
    picture = tmp_path / "folder" / "rooms.svg"
    command = [sys.executable, "-m", "kvtuner_tools.structure", "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rooms ")
    assert Path(picture).read_text().startswith("<svg ")


@pytest.mark.parametrize(("arrows", "status"), [({"top_left": 1}, 0), ({"left_top": 1}, 1)])
def test_the_check_fails_on_a_way_up(arrows, status, monkeypatch, capsys):
    monkeypatch.setattr(structure, "read_structure", lambda: make(**arrows))
    assert structure.main(["--check"]) == status
    assert structure.main([]) == 0
