"""What the pages say, taken apart: links, paths, commands, code blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = ("planner", "parallel", "memory", "trainer", "launch", "tests", "benchmarks", "docs")
COMMANDS = ("longhaul ", "python -m ", ".venv/bin/", "torchrun ", "make ", "OMP_NUM_THREADS=")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_DOTTED = re.compile(r"(?:planner|parallel|memory|trainer|launch|benchmarks|tests)(?:\.\w+)+")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]*)+|\w[\w-]*\.(?:py|md|yaml|toml)|Makefile")
_PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z][A-Z_]+\b|\bN\b")


def pages() -> tuple[Path, ...]:
    return (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Page:
    """``prose``: the text without its code blocks."""

    path: Path
    text: str

    @property
    def prose(self) -> str:
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        return [body for name, body in _FENCE.findall(self.text) if name == language]

    def inline(self) -> list[str]:
        """Inline code, line breaks within it as spaces."""
        return [" ".join(code.split()) for code in _INLINE.findall(self.prose)]

    def links(self) -> list[str]:
        return [link for link in _LINK.findall(self.prose) if "://" not in link]

    def headings(self) -> set[str]:
        """Of each heading what a link to it says after the #."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    def commands(self) -> list[list[str]]:
        """Every command line as words: of code blocks, and of inline code without placeholders."""
        lines = [line for block in self.blocks("") for line in block.splitlines()]
        lines += [code for code in self.inline() if not _PLACEHOLDER.search(code)]
        return [shlex.split(line, comments=True) for line in lines if line.startswith(COMMANDS)]

    def missing(self) -> Iterator[str]:
        """Links, paths and modules of the repository that are named and not there."""
        for link in self.links():
            target, _, heading = link.partition("#")
            path = (self.path.parent / target).resolve() if target else self.path
            if not path.exists():
                yield f"link {link}"
            elif heading and heading not in read(path).headings():
                yield f"link {link}: no such heading"
        for code in self.inline():
            if _DOTTED.fullmatch(code) and not code.endswith(".json") and not _is_module(code):
                yield f"module {code}"
            if _PATH.fullmatch(code) and _is_ours(code) and not (ROOT / code).exists():
                yield f"path {code}"


def read(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))


def all_pages() -> list[Page]:
    return [read(path) for path in pages()]


def _is_ours(code: str) -> bool:
    """Whether it is a place in the repository and not in a run folder or a reader's own."""
    return code.split("/")[0] in TOP or code in ("Makefile", "README.md", "CONTRIBUTING.md", "setup.py")


def _is_module(dotted: str) -> bool:
    """A module, or a name that stands in one."""
    parts = dotted.split(".")
    path = ROOT.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    file = ROOT.joinpath(*parts[:-1]).with_suffix(".py")
    return file.is_file() and re.search(rf"\b{re.escape(parts[-1])}\b", file.read_text(encoding="utf-8")) is not None
