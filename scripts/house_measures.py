"""Measure the code and the docs by reading them: sizes, open seams, circles of imports, doubled names.

Every measure is a pure function of the parsed files; `main` prints them beside their goals.
"""

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("base_config.py", "deploy.py", "rollouts")
SEAM_NAMES = frozenset(
    (
        "engine",
        "engines",
        "client",
        "backend",
        "tokenizer",
        "manager",
        "buffer",
        "model",
        "reward_fn",
    )
)
# Where one name in several places is one meaning. Files of these packages are named after the config's sections: each
# declares, checks, builds or runs what the section of its name configures.
BY_SECTION = (
    "rollouts.config.schema",
    "rollouts.config.checks",
    "rollouts.worker.builders",
    "rollouts.worker.stages",
)
# one layout for each kind of server
BY_KIND = re.compile(r"^rollouts\.engines\.(embedded|sglang|vllm)\b")
CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)

Found = list[tuple[int, str]]  # a count and whose it is, largest first


@dataclass(frozen=True)
class Measure:
    name: str
    goal: int
    found: Found  # everything that counts, whether over the goal or not
    total: bool = False  # the goal is for the number of finds rather than for the largest

    @property
    def value(self) -> int:
        return len(self.found) if self.total else max((count for count, _ in self.found), default=0)

    @property
    def offenders(self) -> Found:
        return self.found if self.total else [item for item in self.found if item[0] > self.goal]


def parse(root: Path = ROOT) -> dict[str, ast.Module]:
    """Parse every module of ours: dotted name -> its tree."""
    files = [
        file
        for name in CODE
        for file in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    return {
        _dotted(file.relative_to(root)): ast.parse(file.read_text(), str(file))
        for file in sorted(files)
    }


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_lines(root: Path = ROOT) -> Found:
    files = [
        file
        for name in CODE
        for file in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    return _sorted(
        (len(file.read_text().splitlines()), str(file.relative_to(root))) for file in files
    )


def function_lines(modules: Mapping[str, ast.Module]) -> Found:
    return _sorted(
        (node.end_lineno - node.lineno + 1, where)
        for where, node in _functions(modules)
        if node.end_lineno
    )


def parameters(modules: Mapping[str, ast.Module]) -> Found:
    """Count the parameters of each function, `self` and `cls` apart; a verb's are the options of its command line."""
    return _sorted(
        (len(_arguments(node)), where)
        for where, node in _functions(modules)
        if not any(ast.unparse(decorator).startswith("verb(") for decorator in node.decorator_list)
    )


def config_fields(modules: Mapping[str, ast.Module]) -> Found:
    """Count the fields of each class of the config's schema."""
    return _sorted(
        (sum(isinstance(line, ast.AnnAssign) for line in node.body), where)
        for where, node in _classes(modules)
        if where.startswith(("base_config.", "rollouts.config.")) and node.name.endswith("Config")
    )


def attributes(modules: Mapping[str, ast.Module]) -> Found:
    """Count the attributes that a class sets on `self`, or declares."""
    return _sorted((len(_attributes(node)), where) for where, node in _classes(modules))


def _attributes(node: ast.ClassDef) -> set[str]:
    declared = {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}
    is_schema = any(
        "dataclass" in ast.unparse(d) for d in node.decorator_list
    ) or "TypedDict" in map(ast.unparse, node.bases)
    stored = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and ast.unparse(inner.value) == "self"
    }
    return stored if is_schema else stored | declared


def open_seams(modules: Mapping[str, ast.Module]) -> Found:
    """Find parameters that connect two rooms and are typed Any, wholly or as an item."""
    return [
        (1, f"{where}({argument.arg})")
        for where, node in _functions(modules)
        for argument in _arguments(node)
        if argument.arg in SEAM_NAMES
        and (argument.annotation is None or re.search(r"\bAny\b", ast.unparse(argument.annotation)))
    ]


def circles(modules: Mapping[str, ast.Module]) -> Found:
    """Find groups of files that import one another, late imports included."""
    return [
        (len(group), " ".join(sorted(group)))
        for group in _knots(_import_graph(modules))
        if len(group) > 1
    ]


def _import_graph(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in modules else node.module for target in below]
            else:
                continue
            graph[name].update(target for target in targets if target in modules and target != name)
    return graph


def _knots(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return strongly connected parts, by reachability: the graph is small."""
    reached = {name: _reachable(graph, name) for name in graph}
    parts: list[set[str]] = []
    for name in graph:
        if not any(name in part for part in parts):
            parts.append({name} | {other for other in reached[name] if name in reached[other]})
    return parts


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left.extend(graph[name])
    return seen


def doubled_names(modules: Mapping[str, ast.Module]) -> Found:
    """Find classes and files of one name in several places, private ones and mirrored layouts apart."""
    places: dict[str, set[str]] = defaultdict(set)
    for where, node in _classes(modules):
        if not node.name.startswith("_"):
            places[node.name].add(where.rpartition(".")[0])
    for name in modules:
        package, _, own = name.rpartition(".")
        if package and own != "__main__" and package not in BY_SECTION:
            places[f"{own}.py"].add(BY_KIND.sub("rollouts.engines.<kind>", package))
    return _sorted(
        (len(found), f"{name}: {', '.join(sorted(found))}")
        for name, found in places.items()
        if len(found) > 1
    )


def probes(modules: Mapping[str, ast.Module]) -> Found:
    """Find `hasattr` and string `getattr` on a seam: a sign of an incomplete protocol."""
    return [
        (1, f"{name}:{node.lineno} {ast.unparse(node)}")
        for name, tree in modules.items()
        if name.startswith(("rollouts.training", "rollouts.worker", "rollouts.agents"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("hasattr", "getattr")
        and ast.unparse(node.args[0]).rpartition(".")[2].lstrip("_")
        in SEAM_NAMES - {"model", "tokenizer"}
    ]


@dataclass(frozen=True)
class Page:
    path: str
    words: int
    blocks: int
    headings: int
    sentence: float  # words a sentence, on average


def pages(root: Path = ROOT) -> list[Page]:
    """Measure README and docs, code blocks counted apart from prose."""
    files = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [_page(str(file.relative_to(root)), file.read_text()) for file in files]


def _page(path: str, text: str) -> Page:
    blocks = CODE_BLOCK.findall(text)
    prose = CODE_BLOCK.sub("\n\n", text)
    lines = [line for line in prose.splitlines() if not line.lstrip().startswith(("|", "#"))]
    paragraphs = re.split(r"\n\s*\n|\n\s*[-*] |\n\s*\d+\. ", "\n".join(lines))
    sentences = [
        s for p in paragraphs for s in re.split(r"(?<=[.!?:])\s+", p.strip()) if len(s.split()) > 2
    ]
    words = len(re.findall(r"\S+", prose))
    spoken = sum(len(sentence.split()) for sentence in sentences)
    return Page(
        path,
        words,
        len(blocks),
        len(re.findall(r"^#+ ", prose, re.M)),
        spoken / max(len(sentences), 1),
    )


def _functions(
    modules: Mapping[str, ast.Module],
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def _classes(modules: Mapping[str, ast.Module]) -> Iterator[tuple[str, ast.ClassDef]]:
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f"{name}.{node.name}", node


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument for argument in arguments if argument.arg not in ("self", "cls")]


def _sorted(items: Iterable[tuple[int, str]]) -> Found:
    return sorted(items, key=lambda item: (-item[0], item[1]))


def measures(root: Path = ROOT) -> list[Measure]:
    modules = parse(root)
    return [
        Measure("lines of a file", 400, file_lines(root)),
        Measure("lines of a function", 70, function_lines(modules)),
        Measure("fields of a config class", 25, config_fields(modules)),
        Measure("parameters of a function", 10, parameters(modules)),
        Measure("attributes of a class", 12, attributes(modules)),
        Measure("seams typed Any", 0, open_seams(modules), total=True),
        Measure("hasattr/getattr on a seam", 0, probes(modules), total=True),
        Measure("circles of imports", 0, circles(modules), total=True),
        Measure("names with two meanings", 0, doubled_names(modules), total=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="list every offender")
    shown = 10_000 if parser.parse_args().all else 3
    for measure in measures():
        mark = "ok  " if measure.value <= measure.goal else "over"
        print(
            f"{mark} {measure.name:<28} {measure.value:>5}   goal <= {measure.goal:<5} over: {len(measure.offenders)}"
        )
        for count, where in measure.offenders[:shown]:
            print(f"       {count:>5} {where}")
    docs = pages()
    words = sum(page.words for page in docs)
    print(f"\ndocs: {words} words, {len(docs)} pages; per 1,000 words:")
    print(f"  code blocks {1000 * sum(p.blocks for p in docs) / words:.1f} (goal >= 6)")
    print(f"  headings {1000 * sum(p.headings for p in docs) / words:.1f} (goal >= 10)")
    print(f"  words a sentence {sum(p.sentence * p.words for p in docs) / words:.1f} (goal <= 15)")
    for page in sorted(docs, key=lambda page: -page.words)[:shown]:
        print(f"  {page.words:>6} words  {page.path} (goal <= 1500)")


if __name__ == "__main__":
    main()
