"""Does an environment hold what was required of it? PEP 508 lines against versions. Pure, standard library only.

The host's Python has no `packaging`, and an environment that uv made has no pip to borrow it from. Lines that name no
package (options, paths, bare URLs) are not judged.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*"
    r"(?:@\s*(?P<url>\S+)|\(?(?P<specifiers>[^;()]*)\)?)\s*(?:;\s*(?P<marker>.*))?"
)
_SPECIFIER = re.compile(r"\s*(===|==|!=|~=|<=|>=|<|>)\s*(\S+)\s*")
_VERSION = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_n>\d*))?"
    r"(?:-(?P<post_bare>\d+)|[-_.]?(?P<post>post|rev|r)[-_.]?(?P<post_n>\d*))?"
    r"(?:[-_.]?(?P<dev>dev)[-_.]?(?P<dev_n>\d*))?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?",
    re.IGNORECASE,
)
_FILE_ENDS = (".whl", ".zip", ".tar.gz")
_PRE = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}
_FIRST, _LAST = ((-1, ""),), ((1, ""),)  # before and after every pre-release


@dataclass(frozen=True)
class Requirement:
    """A line that names a package: its name as indexes write it, its version specifiers, its marker."""

    name: str
    specifiers: tuple[tuple[str, str], ...]  # (("==", "2.13.0"),)
    marker: str  # "" for none


@dataclass(frozen=True)
class Version:
    """A version as PEP 440 orders it."""

    epoch: int
    release: tuple[int, ...]  # without zeros at its end
    written: tuple[int, ...]  # the release as it was written
    pre: tuple[str, int] | None
    post: int | None
    dev: int | None
    local: str

    @property
    def public(self) -> tuple[Any, ...]:
        """The sort key without the local part."""
        if self.pre is not None:
            pre: tuple[Any, ...] = ((0, self.pre[0]), (0, str(self.pre[1]).zfill(20)))
        else:
            pre = _FIRST if self.post is None and self.dev is not None else _LAST
        dev = (0, self.dev) if self.dev is not None else (1, 0)
        return (self.epoch, self.release, pre, -1 if self.post is None else self.post, dev)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(line: str) -> Requirement | None:
    """Read one line; None for one that names no package, or is not understood."""
    text = re.split(r"(?:^|\s)#|\s--hash|\s+\\\s*$", line.strip())[0].strip()
    match = _LINE.fullmatch(text)
    if match is None or (match["url"] is None and text.endswith(_FILE_ENDS)):
        return None
    parts = [part for part in (match["specifiers"] or "").split(",") if part.strip()]
    specifiers = [_SPECIFIER.fullmatch(part) for part in parts]
    if any(found is None for found in specifiers):
        return None
    pairs = tuple((found[1], found[2]) for found in specifiers if found is not None)
    return Requirement(canonical(match["name"]), pairs, (match["marker"] or "").strip())


def problems(
    requirements: Iterable[str],
    constraints: Iterable[str],
    installed: Mapping[str, str],
    markers: Mapping[str, str],
) -> list[str]:
    """Return what is lacking or at another version, one text each.

    `installed` gives versions by canonical name, `markers` the interpreter's values (PEP 508). A constraint binds only
    what is installed.
    """
    found = []
    for lines, needed in ((requirements, True), (constraints, False)):
        for line in lines:
            wanted = parse(line)
            if wanted is None or not applies(wanted.marker, markers):
                continue
            version = installed.get(wanted.name)
            if version is None:
                found += [f"{wanted.name} is not installed"] if needed else []
            elif not satisfies(version, wanted.specifiers):
                text = ",".join(f"{operator}{limit}" for operator, limit in wanted.specifiers)
                found.append(f"{wanted.name} is {version}, needs {text}")
    return list(dict.fromkeys(found))


def version_of(text: str) -> Version | None:
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        return None
    written = tuple(int(part) for part in match["release"].split("."))
    release = written
    while len(release) > 1 and release[-1] == 0:
        release = release[:-1]
    pre = match["pre"].lower() if match["pre"] else None
    post = match["post_bare"] or (match["post_n"] or "0" if match["post"] else None)
    return Version(
        epoch=int(match["epoch"] or 0),
        release=release,
        written=written,
        pre=(_PRE.get(pre, pre), int(match["pre_n"] or 0)) if pre else None,
        post=int(post) if post is not None else None,
        dev=int(match["dev_n"] or 0) if match["dev"] else None,
        local=re.sub(r"[-_.]", ".", match["local"] or "").lower(),
    )


def satisfies(version: str, specifiers: Iterable[tuple[str, str]]) -> bool:
    """Return whether a version meets all specifiers; pre-releases are taken as they come."""
    return all(_meets(version, operator, limit) for operator, limit in specifiers)


def _meets(text: str, operator: str, limit_text: str) -> bool:
    if operator == "===":
        return text.lower() == limit_text.lower()
    version, limit = version_of(text), version_of(limit_text.removesuffix(".*"))
    if version is None or limit is None:  # not of PEP 440: equal or not is all that can be said
        return (text == limit_text) == (operator != "!=")
    if limit_text.endswith(".*"):
        return _has_prefix(version, limit.written, epoch=limit.epoch) == (operator == "==")
    return _compares(version, operator, limit)


def _compares(version: Version, operator: str, limit: Version) -> bool:
    same = version.public == limit.public and (not limit.local or version.local == limit.local)
    same_release = (version.epoch, version.release) == (limit.epoch, limit.release)
    late = version.post is not None and version.pre == limit.pre and limit.post is limit.dev is None
    return {
        "==": same,
        "!=": not same,
        "~=": version.public >= limit.public
        and _has_prefix(version, limit.written[:-1], epoch=limit.epoch),
        "<=": version.public <= limit.public,
        ">=": version.public >= limit.public,
        "<": version.public < limit.public and not (same_release and _is_early(version, limit)),
        ">": version.public > limit.public and not (same_release and late),  # >2 leaves out 2.post1
    }[operator]


def _is_early(version: Version, limit: Version) -> bool:
    """Is it a pre-release of the limit itself? <2 leaves out 2rc1."""
    if limit.pre is limit.post is limit.dev is None:
        return version.pre is not None or version.dev is not None
    own_post = (
        limit.post is not None and version.post == limit.post and limit.pre is version.pre is None
    )
    return own_post and limit.dev is None and version.dev is not None


def _has_prefix(version: Version, release: tuple[int, ...], *, epoch: int) -> bool:
    """Tell whether a release matches `==2.13.*`: it begins with it, whatever follows; zeros that were not written
    count."""
    count = len(release)
    return version.epoch == epoch and (version.written + (0,) * count)[:count] == release


# --- markers --------------------------------------------------------------------------------------------------------


def applies(marker: str, values: Mapping[str, str]) -> bool:
    """Return whether a marker holds. One that is not understood does not: nothing is asked of such a line."""
    if not marker:
        return True
    try:
        return _holds(ast.parse(marker, mode="eval").body, values)
    except (SyntaxError, KeyError, TypeError):
        return False


def _holds(node: ast.expr, values: Mapping[str, str]) -> bool:
    if isinstance(node, ast.BoolOp):
        held = [_holds(part, values) for part in node.values]
        return all(held) if isinstance(node.op, ast.And) else any(held)
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise TypeError("a marker is made of comparisons, `and` and `or`")
    left, right = (_text(part, values) for part in (node.left, node.comparators[0]))
    operator = node.ops[0]
    if isinstance(operator, (ast.In, ast.NotIn)):
        return (left in right) == isinstance(operator, ast.In)
    signs = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
    sign = signs[type(operator)]
    if version_of(left) and version_of(right.removesuffix(".*")):
        return _meets(left, sign, right)
    return {"==": left == right, "!=": left != right}.get(sign, False)


def _text(node: ast.expr, values: Mapping[str, str]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return "" if node.id == "extra" else values[node.id]
    raise TypeError("a marker compares names and texts")
