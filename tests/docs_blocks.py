"""What README and docs hold as code: fenced blocks and commands. Pure text in, values out, and a runner of blocks."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
GUIDE = tuple(page for page in PAGES if page.startswith("docs/guide/"))
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
        end = next(
            (end for end in range(at + 1, len(lines)) if _closes(lines[end], opened["fence"])),
            len(lines),
        )
        marker = _MARKER.fullmatch(
            next((line for line in reversed(lines[:at]) if line.strip()), "")
        )
        language = (opened["info"].split() or [""])[0]
        body = "\n".join(lines[at + 1 : end])
        found.append(Block(page, at + 2, language, body, marker["reason"] if marker else None))
        at = end + 1
    return found


def _closes(line: str, fence: str) -> bool:
    bare = line.strip()
    return set(bare) == {fence[0]} and len(bare) >= len(fence)


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block; comments and the text of here-documents are left out."""
    joined = re.sub(r"<<'?(\w+)'?(.*?)\n\1$", "", text, flags=re.DOTALL | re.MULTILINE).replace(
        "\\\n", " "
    )
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while breaks := [word for word in words if word in ("&&", "|")]:
            yield words[: words.index(breaks[0])]
            words = words[words.index(breaks[0]) + 1 :]
        if words:
            yield words


def spoken_commands(text: str) -> Iterator[list[str]]:
    """Commands within a sentence or a table, in backticks: brackets say what may be left out."""
    for command in _COMMAND.findall(text):
        if "…" not in command:
            yield shlex.split(re.sub(r"[\[\]]", " ", command.replace("\n", " ")))


def is_run(block: Block) -> bool:
    """Whether a shell block runs for real: all of the guide, elsewhere those that ask a server on this machine."""
    return block.language == "sh" and (block.page in GUIDE or block.text.startswith("curl "))


def run_page(page: str, engine_url: str, check: str) -> None:
    """Run the page's blocks in order, Python with the names of the blocks before; then `check` must be true.

    A Python block whose first line is a comment with a file's name is that file as well. A block `output` is compared
    with what the block before it printed.
    """
    module, printed = ModuleType("documented"), ""
    sys.modules["documented"] = module
    sys.path.insert(0, os.getcwd())
    for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")):
        text = block.text.replace("http://localhost:30000", engine_url)
        if block.not_run is not None:
            continue
        if block.language == "python":
            if named := re.match(r"# ([\w/]+\.py)\b", text):
                Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(named[1]).write_text(text + "\n")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(
                    compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec"),
                    module.__dict__,
                )
            printed = out.getvalue()
        elif is_run(block):
            done = subprocess.run(
                ["bash", "-euc", text], check=False, capture_output=True, text=True, timeout=1400
            )
            printed = done.stdout + done.stderr
            wanted = re.findall(r"# exit (\d+)", text)
            assert done.returncode == int(wanted[0] if wanted else 0), (
                f"{page}:{block.line}\n{printed}"
            )
        elif block.language == "output":
            problem = output_problem(block.text, printed)
            assert not problem, f"{page}:{block.line}: {problem}\nprinted was:\n{printed}"
    assert eval(check, module.__dict__), f"{page}: after its blocks it is not true that {check}"


def output_problem(documented: str, printed: str) -> str:
    """The first documented line that was not printed, in this order; "" if all were.

    Numbers, durations, paths and space are not compared; a line `…` stands for any lines, `…` within one for any text.
    """
    left = iter([masked(line) for line in printed.splitlines()])
    for line in documented.splitlines():
        pattern = ".*".join(re.escape(part.strip()) for part in masked(line).split("…"))
        if line.strip() not in ("", "…") and not any(
            re.fullmatch(pattern, other) for other in left
        ):
            return f"not printed: {line!r}, as {masked(line)!r}"
    return ""


def masked(line: str) -> str:
    """`line` without what differs from run to run: numbers with their units, paths, signs of a bar, space."""
    line = re.sub(r"(?<![\w.])[~.]?(?:/[\w.+-]+)+/?", "PATH", line)
    line = re.sub(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "#", line)
    line = re.sub(r"[-+]?\d[\d.,:]*(?:e[-+]?\d+)?(?: ?(?:s|ms|min|m|h|MB|GiB|MB/s)\b)?", "#", line)
    line = re.sub(r"#(?:\s+#)+", "#", line)
    return " ".join(re.sub(r"[━╸╺─]+", " ", line).split())


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    run_page(*sys.argv[2:])
