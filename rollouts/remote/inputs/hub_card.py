"""The data files that a data set's card (README.md) names for a split. Pure; reads the plain part of YAML alone."""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any

_FRONT = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"""(?P<key>[\w.-]+|"[^"]*"|'[^']*')\s*:(?:\s+(?P<value>.*))?""")
Lines = list[tuple[int, str]]  # indentation, text


class _NotPlainError(ValueError):
    """YAML that is not read here: anchors, folded text, flow style."""


def has_configs(card: str) -> bool:
    """Return whether the card says which files belong to which config; else the files' names do."""
    front = _FRONT.match(card)
    return front is not None and re.search(r"^configs\s*:", front[1], re.MULTILINE) is not None


def files_by_card(card: str, files: Sequence[str], subset: str | None, split: str) -> list[str]:
    """Return those of `files`, paths below the card's folder, that are `split` of `subset`; [] where there is a doubt.

    Without a subset there is one config, or one that is called default or marked so.
    """
    front = _FRONT.match(card)
    try:
        configs = _value(_section(front[1] if front else "", "configs"))
        config = _chosen(configs, subset)
        parts = (
            config.get("data_files")
            if isinstance(config, dict) and "data_dir" not in config
            else None
        )
        if not isinstance(parts, list):
            return []
        paths = [path for part in parts if part["split"] == split for path in _listed(part["path"])]
    except (_NotPlainError, KeyError, TypeError):
        return []
    return sorted({file for path in paths for file in files if _matches(file, path)})


def _chosen(configs: Any, subset: str | None) -> Any:
    if not isinstance(configs, list):
        return None
    if subset is None:
        marked = [
            one
            for one in configs
            if one.get("default") == "true" or one.get("config_name") == "default"
        ]
        configs = marked or configs
    else:
        configs = [one for one in configs if one.get("config_name") == subset]
    return configs[0] if len(configs) == 1 else None


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _matches(file: str, pattern: str) -> bool:
    """Match folder by folder; "**" is not read here."""
    if "**" in pattern:
        raise _NotPlainError(pattern)
    names, parts = file.split("/"), pattern.removeprefix("./").split("/")
    return len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))


# --- the plain part of YAML -----------------------------------------------------------------------------------------


def _section(text: str, name: str) -> Lines:
    """Return the lines below a key of the outermost level."""
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines()]
    lines = [(indent, line) for indent, line in lines if line and not line.startswith("#")]
    start = next((at for at, line in enumerate(lines) if line == (0, f"{name}:")), None)
    if start is None:
        return []
    rest = lines[start + 1 :]
    end = next(
        (at for at, (indent, line) in enumerate(rest) if indent == 0 and not line.startswith("-")),
        len(rest),
    )
    return rest[:end]


def _value(lines: Lines) -> Any:
    if not lines:
        return None
    if lines[0][1].startswith("- ") or lines[0][1] == "-":
        return [_item(part) for part in _parts(lines)]
    found = {}
    for (_, head), *below in _parts(lines):
        match = _KEY.fullmatch(head)
        if match is None:
            raise _NotPlainError(head)
        given = match["value"]
        found[_scalar(match["key"])] = _value(below) if not given else _scalar(given)
    return found


def _item(part: Lines) -> Any:
    """Return an item of a list, without its dash."""
    indent, head = part[0]
    bare = head[1:].lstrip()
    if not bare:
        return _value(part[1:])
    inner = [(indent + len(head) - len(bare), bare), *part[1:]]
    return _value(inner) if _KEY.fullmatch(bare) else _scalar(bare)


def _parts(lines: Lines) -> Iterator[Lines]:
    """Cut lines at each that is indented like the first; a list may be indented like the key that it belongs to."""
    first, is_list = lines[0][0], lines[0][1].startswith("-")
    part: Lines = []
    for indent, text in lines:
        if indent < first:
            raise _NotPlainError(text)
        if indent == first and part and (is_list or not text.startswith("-")):
            yield part
            part = []
        part.append((indent, text))
    yield part


def _scalar(text: str) -> str:
    quoted = re.fullmatch(r"""(["'])(.*)\1(?:\s+#.*)?""", text)
    if quoted is not None and "\\" not in quoted[2]:
        return quoted[2]
    bare = re.sub(r"\s+#.*$", "", text)
    if not bare or bare[0] in "[{&*!|>%@`\"'":
        raise _NotPlainError(text)
    return bare
