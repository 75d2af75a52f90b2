"""``python -m kvtuner_tools.bench.tables``: rewrite what is generated, in the repository's root."""

import argparse
import sys
from pathlib import Path

from kvtuner_tools.bench import step_times

from . import markdown, pictures
from .published import Published
from .steps import measured_steps


def main() -> int:
    """Rewrite pages and pictures, or with ``--check`` only say which would change (exit status 1)."""
    parser = argparse.ArgumentParser(prog="python -m kvtuner_tools.bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parser.parse_args()
    root = Path.cwd()
    published = Published(root)
    changed = []
    for page in markdown.pages(root):
        text = page.read_text()
        if (new := markdown.rewrite(text, published, page)) != text:
            changed.append(page)
            if not arguments.check:
                page.write_text(new)
    for path in pictures.outdated(root, published):
        changed.append(path)
        if not arguments.check:
            pictures.draw(path, published)
    steps = step_times.render(measured_steps(published))
    table = root / "tools" / "bench" / step_times.TABLE.name
    if not table.exists() or table.read_text() != steps:
        changed.append(table)
        if not arguments.check:
            table.write_text(steps)
    for path in changed:
        print(path.relative_to(root))
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
