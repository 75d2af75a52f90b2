"""The table's rows, as lines of JSON, and the verdict on one. Without torch and vLLM, so that the page does without."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "reference" / "models.jsonl"
PAGE = ROOT / "docs" / "reference" / "models.md"
SCHEMA = "kvtuner-architectures/1"

PAIR = "K8V8"
MIXED = ("K8V4", "K4V8", "K16V16")
"""Pairs of the mixed profile's attention layers, in turn, without transforms."""
SERVED, REFUSED, WRONG, FAILS, UNCLEAR = "served", "refused", "wrong", "fails", "unclear"
NOT_RUN, NOT_BUILT = "not run", "not built"

UNSCALED, UNSCALED_TIMES = "gemma4", 4
"""Kinds of models whose logits are not divided by the root of the head size, and how much larger a KL they may have:
an error of their keys weighs that root more."""
MAX_KL = {PAIR: 5e-3, "mixed": 0.3}
"""Nats per token, mean of a text: more is wrong. A layer that reads another's pages gives more than either."""
MAX_NOISE = 3.0
"""The KL may be so many times that of vLLM's own cache from itself, decoded instead of prefilled, if that is more."""
MIN_CONTRAST = 10.0
"""How many times the KL of ``PAIR`` a broken cache must have: otherwise the texts do not show what is wrong."""


@dataclass
class Row:
    """What the table has of an architecture.

    Args:
        architecture: as vLLM registers it.
        status: SERVED and so on.
        words: of a refusal or an error; of what is wrong.
        model_type: of its configuration.
        more_than_text: whether it takes pictures or sounds, which the texts here have none of.
        check: problems that ``kvtuner profile check K8V8 --model`` has with it; none where it passes.
        with_pictures: problems that the engine's own checks have where pictures are allowed.
        dtype: of the model.
        attention_layers: that the profile was resolved for.
        packed: layers with packed pages.
        unpacked: names of those without.
        kl: by ``K8V8``, ``mixed``, ``broken`` and ``own``: largest mean KL of a text from vLLM's own cache, nats per
            token, in prefill and in decode. ``own`` is that cache's own, for the noise: decoded, and then prefilled.
        differs: of K8V8: first generated token that vLLM's own cache would not have taken, and by how many nats.
    """

    architecture: str
    status: str = NOT_BUILT
    words: str = ""
    model_type: str = ""
    more_than_text: bool = False
    check: tuple[str, ...] = ()
    with_pictures: str | None = None
    dtype: str = "float32"
    attention_layers: int = 0
    packed: int = 0
    unpacked: tuple[str, ...] = ()
    kl: dict[str, tuple[float, float]] = field(default_factory=dict)
    differs: tuple[int, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """What is not as by default, as JSON has it."""
        default = asdict(Row(self.architecture))
        return {k: v for k, v in asdict(self).items() if k in ("architecture", "status") or v != default[k]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Row":
        """What :meth:`to_json` gave."""
        row = cls(**values)
        row.check, row.unpacked = tuple(row.check), tuple(row.unpacked)
        row.kl = {name: (prefill, decode) for name, (prefill, decode) in row.kl.items()}
        row.differs = None if row.differs is None else (row.differs[0], row.differs[1])
        return row


def judge(row: Row) -> tuple[str, str]:
    """Status and words of an architecture whose engines all answered."""
    wrong = []
    if row.unpacked or row.packed != row.attention_layers:
        wrong.append(
            f"{row.packed} layers are packed, where the profile knows {row.attention_layers}"
            + (f"; not packed: {', '.join(row.unpacked)}" if row.unpacked else "")
        )
    own = max(row.kl["own"])
    for name, most in MAX_KL.items():
        most *= UNSCALED_TIMES if row.model_type.startswith(UNSCALED) else 1
        if not max(row.kl[name]) <= max(most, MAX_NOISE * own):
            wrong.append(f"KL of {name} must be at most {most}, but is {max(row.kl[name]):.2g}")
    if wrong:
        return WRONG, "; ".join(wrong)
    pair, broken = max(row.kl[PAIR]), max(row.kl["broken"])
    if broken < MIN_CONTRAST * pair:
        found = f"{broken:.2g} beside {pair:.2g}"
        if pair <= MAX_NOISE * own:
            found += f"; vLLM's own cache has {own:.2g} from itself"
        return UNCLEAR, f"a broken cache must have {MIN_CONTRAST:g} times the KL, but has {found}"
    return SERVED, ""


@dataclass
class Table:
    """All rows.

    Args:
        versions: of the packages that made them.
        rows: by architecture.
    """

    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Table":
        """The rows of a file, the last of each architecture; an empty table where there is no file.

        Raises:
            ValueError: another schema.
        """
        table = cls()
        if not path.exists():
            return table
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        head = json.loads(first)
        if head.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, but got {head.get('schema')}")
        table.versions = head["versions"]
        for line in lines:
            row = Row.from_json(json.loads(line))
            table.rows[row.architecture] = row
        return table

    def add(self, row: Row, path: Path) -> None:
        """Keep a row, and append it to a file, so that nothing is lost where the work is ended."""
        self.rows[row.architecture] = row
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(row.to_json()))

    def write(self, path: Path, order: Iterable[str] | None = None) -> None:
        """Write the file anew.

        Args:
            path: the file.
            order: architectures that are kept, by default all in the order in which they were made.
        """
        names = self.rows if order is None else [name for name in order if name in self.rows]
        head = {"schema": SCHEMA, "versions": self.versions}
        lines = [_line(head), *(_line(self.rows[name].to_json()) for name in names)]
        path.write_text("".join(lines), encoding="utf-8")


def _line(values: Any) -> str:
    return json.dumps(values) + "\n"
