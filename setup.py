"""The long description of the package; all else stands in pyproject.toml.

README's links and pictures are relative, for whoever reads it in a checkout. A package index shows the text alone,
where they would lead nowhere.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!(?:[a-z]+:|#))([^)\s]+)\)")


def long_description(readme: str, source: str | None, tag: str) -> str:
    """README as an index shows it.

    Args:
        readme: in Markdown.
        source: address of the repository, whose files are served under ``blob/TAG`` and ``raw/TAG`` as by GitHub,
            Forgejo and the like. Relative links then lead there; without one, their text stays and pictures go.
        tag: of this version.
    """

    def absolute(match: re.Match[str]) -> str:
        picture, text, path = match.groups()
        if source is None:
            return "" if picture else text
        return f"{picture}[{text}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/{tag}/{path})"

    text = _LINK.sub(absolute, _COMMENT.sub("", readme))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def version() -> str:
    """``__version__``, read without importing the package."""
    text = (ROOT / "vllm_kvtuner" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=long_description(
            (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Source"), f"v{version()}"
        ),
        long_description_content_type="text/markdown",
    )
