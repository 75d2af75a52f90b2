"""What the troubleshooting page quotes is what the code says, and what pages import is there."""

import ast
import importlib
import re
from collections.abc import Iterator

import pytest

from tests.helpers import markdown
from tests.helpers.markdown import DOCS, ROOT

FOREIGN = ("unrecognized arguments: --kvtuner-profile", "invalid choice: 'kvtuner'", "No package metadata was found")
"""Messages of argparse and vLLM."""
DROPPED = 4
"""Leading words of a quotation that may come from elsewhere, such as the key that breaks a rule."""

_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?![\w.])")
_IMPORT = re.compile(r"^from (vllm_kvtuner\S*) import ([\w, ]+)$", re.MULTILINE)


def literals() -> str:
    """All string literals of the product, placeholders and numbers as {}."""
    found = []
    for folder in ("vllm_kvtuner", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return _NUMBER.sub("{}", "\n".join(found))


def quotations() -> Iterator[str]:
    """Messages in the first column of the page's tables."""
    text = (DOCS / "operate" / "troubleshooting.md").read_text(encoding="utf-8")
    for line in text.partition("## While it runs")[0].splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


@pytest.fixture(scope="module")
def product() -> str:
    return literals()


@pytest.mark.parametrize("quotation", [each for each in quotations() if not each.startswith(FOREIGN)])
def test_messages_are_those_of_the_code(quotation, product):
    for fragment in re.split(r"\s*\.\.\.\s*", quotation):
        words = _NUMBER.sub("{}", fragment).split()
        candidates = [" ".join(words[start:]) for start in range(min(DROPPED, max(1, len(words) - 1)))]
        assert not words or any(candidate in product for candidate in candidates), fragment


def test_pages_import_what_is_there():
    found = 0
    for page in markdown.pages():
        for code in markdown.fences(page.read_text(encoding="utf-8")):
            for module, names in _IMPORT.findall(code):
                for name in names.split(", "):
                    assert hasattr(importlib.import_module(module), name), f"{page}: {module}.{name}"
                    found += 1
    assert found
