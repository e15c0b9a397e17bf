"""What README and docs hold as code: fenced blocks and commands. Pure text in, values out, and a runner of blocks."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r" {0,3}(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_MARKER = re.compile(r"<!-- not run: (?P<reason>.+) -->")
_COMMAND = re.compile(
    r"`((?:OMP_NUM_THREADS=1 )?(?:deploy|scripts/\w+|(?:\.venv/bin/)?python|python -m) [^`]*|scripts/\w+)`"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, the first word after the fence, and why it cannot run, if so."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None


def blocks_of(page: str, text: str) -> list[Block]:
    """Every fenced block, as CommonMark reads them: a fence is closed by one at least as long, or by the end."""
    found, lines, at = [], text.splitlines(), 0
    while at < len(lines):
        opened = _FENCE.fullmatch(lines[at])
        if opened is None:
            at += 1
            continue
        end = next((end for end in range(at + 1, len(lines)) if _closes(lines[end], opened["fence"])), len(lines))
        marker = _MARKER.fullmatch(next((line for line in reversed(lines[:at]) if line.strip()), ""))
        language = (opened["info"].split() or [""])[0]
        body = "\n".join(lines[at + 1 : end])
        found.append(Block(page, at + 2, language, body, marker["reason"] if marker else None))
        at = end + 1
    return found


def _closes(line: str, fence: str) -> bool:
    bare = line.strip()
    return set(bare) == {fence[0]} and len(bare) >= len(fence)


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block; comments are left out."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def spoken_commands(text: str) -> Iterator[list[str]]:
    """Commands within a sentence or a table, in backticks: brackets say what may be left out."""
    for command in _COMMAND.findall(text):
        if "…" not in command:
            yield shlex.split(re.sub(r"[\[\]]", " ", command.replace("\n", " ")))


def run_page(page: str, engine_url: str, check: str) -> None:
    """Run the page's python blocks in order, each with the names of those before it; then `check` must be true."""
    module = ModuleType("documented")
    sys.modules["documented"] = module
    for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")):
        if block.language == "python" and block.not_run is None:
            code = block.text.replace("http://localhost:30000", engine_url)
            exec(compile("\n" * (block.line - 1) + code, str(ROOT / page), "exec"), module.__dict__)
    assert eval(check, module.__dict__), f"{page}: after its blocks it is not true that {check}"


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    run_page(*sys.argv[2:])
