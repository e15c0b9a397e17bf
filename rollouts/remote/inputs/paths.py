"""Where a name of the config leads among the files that are sent, by following links as the host will."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rollouts.plain_files import reading
from rollouts.remote.errors import Problem

PathState = Literal["sent", "not sent", "missing"]
LINKS_MAX = 40  # in a row, as in the kernel
POINTER_BYTES_MAX = 1024
POINTERS = {  # how a pointer to the real file begins, and what fetches that file
    b"version https://git-lfs": "git lfs pull",
    b"version https://hawser": "git lfs pull",
    b"/annex/objects/": "git annex get",
}


@dataclass(frozen=True)
class Located:
    """What a name leads to."""

    name: str  # as the config has it
    state: PathState
    file: str = ""  # where it leads to, from the repository's root; "" where that is outside
    links: tuple[str, ...] = ()  # "configs/mine.jsonl -> ../outside.jsonl", each link on the way
    why: Literal["", "ignored", "outside", "dangling", "submodule"] = (
        ""  # it would not reach the host
    )


class SentFiles:
    """The files that are sent, as a tree to walk in."""

    def __init__(self, root: Path, files: Iterable[str], *, absent: Iterable[str] = ()) -> None:
        """`absent`: submodules that are not checked out, so that their files are not here."""
        self.root, self.files, self.absent = root, frozenset(files), tuple(absent)
        self.folders = {folder for file in self.files for folder in _folders(file)}

    def locate(self, name: str) -> Located:
        """Follow `name` from the tree's root. A link that is absolute, or climbs above the root, leads outside."""
        todo, done, links = name.split("/"), list[str](), list[str]()
        while todo:
            part = todo.pop(0)
            if part == "..":
                if not done:
                    return Located(name, self._outside(name), links=tuple(links), why="outside")
                done.pop()
            elif part not in ("", "."):
                path = "/".join([*done, part])
                if not os.path.islink(self.root / path):
                    done.append(part)
                    continue
                target = os.readlink(self.root / path)
                links.append(f"{path} -> {target}")
                if path not in self.files:
                    return Located(name, "not sent", path, tuple(links), "ignored")
                if os.path.isabs(target):
                    return Located(name, "not sent", links=tuple(links), why="outside")
                if len(links) > LINKS_MAX:
                    return Located(name, "missing", links=tuple(links[:2]), why="dangling")
                todo = [*target.split("/"), *todo]
        return self._found(name, "/".join(done), tuple(links))

    def _found(self, name: str, file: str, links: tuple[str, ...]) -> Located:
        if within := [folder for folder in self.absent if f"{file}/".startswith(f"{folder}/")]:
            return Located(name, "not sent", within[0], links, "submodule")
        if file in self.files or file in self.folders:
            return Located(name, "sent", file, links)
        if (self.root / file).exists():
            return Located(name, "not sent", file, links, "ignored")
        return Located(name, "missing", file, links, "dangling" if links else "")

    def _outside(self, name: str) -> PathState:
        return "not sent" if (self.root / name).exists() else "missing"

    def below(self, folder: str) -> Iterator[str]:
        """Return the files that are sent in `folder`, at any depth; not those behind a link to a folder."""
        return (file for file in sorted(self.files) if not folder or file.startswith(folder + "/"))

    def left_behind(self, folder: str) -> Iterator[str]:
        """Return files in `folder` here that are not sent."""
        for directory, _, names in os.walk(self.root / folder):
            for name in sorted(names):
                file = os.path.relpath(os.path.join(directory, name), self.root)
                if file not in self.files:
                    yield file


def _folders(file: str) -> Iterator[str]:
    while file := file.rpartition("/")[0]:
        yield file


def path_problem(found: Located) -> Problem | None:
    """Return why what `found` names would not reach the host; None if it would, or is not here at all."""
    name, links = found.name, "\n".join(found.links)
    needed = "a path that git lists, an absolute path on the host, or a hub id"
    copy = f"copy it to the host and name it there: /…/{Path(name).name}"
    if found.why == "outside" and links:
        fix = f"put a copy in the link's place, or {copy}"
        return Problem(
            f"{name!r} leads out of the repository, so it would not reach the host.",
            links,
            needed,
            fix,
        )
    if found.why == "outside" and found.state == "not sent":
        fix = f"move it into the repository, or {copy}"
        return Problem(
            f"{name!r} lies outside of the repository, so it would not reach the host.",
            "",
            needed,
            fix,
        )
    if found.why == "submodule":
        message = f"{name!r} lies in the submodule {found.file}, which is not checked out."
        return Problem(
            message, links, needed, f"git submodule update --init --recursive -- {found.file}"
        )
    if found.why == "dangling":
        return Problem(f"{name!r} is a link that leads nowhere.", links, needed, "correct the link")
    if found.why == "ignored":
        what = (
            f"{name!r} is here, but git ignores it"
            if not links
            else f"{name!r} leads to what git ignores"
        )
        shown = "\n".join(
            filter(None, (links, "" if found.file == name else f"ignored: {found.file}"))
        )
        fix = f"remove it from .gitignore, or {copy}"
        return Problem(f"{what}, so it would not reach the host.", shown, needed, fix)
    return None


def pointer_problem(root: Path, file: str) -> Problem | None:
    """Return why `file` is not what it seems to be, a pointer of git-lfs or git-annex; None if it is."""
    try:
        if (root / file).stat().st_size > POINTER_BYTES_MAX:
            return None
        with reading(root / file) as stream:
            text = stream.read(64)
    except OSError:
        return None  # reading it for the digest tells
    for begins, command in POINTERS.items():
        if text.startswith(begins):
            return Problem(
                f"{file!r} is a pointer to a large file that is not here.",
                found=text.splitlines()[0].decode(errors="replace"),
                needed="the file itself: what lies in the working tree is sent",
                fix=f"{command} {file}",
            )
    return None
