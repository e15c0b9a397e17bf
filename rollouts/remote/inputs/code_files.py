"""The functions that a config names by dotted path: is their module sent, and does it define them?"""

import ast
import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollouts.config import Config
from rollouts.remote.errors import Problem
from rollouts.remote.inputs.modules import Module, read_module, required_keys, takes_one_argument
from rollouts.remote.inputs.paths import Located, SentFiles, path_problem
from rollouts.remote.inputs.same_names import OWN_PACKAGE, distribution_names, same_name_problem

MODULES_MAX = 500  # read while following imports
BUILT_IN_KEYS = {
    f"rollouts.training.rewards.{name}": {"tests": 0} for name in ("code_tests", "code_tests_all")
}


# what each is called with
TAKES_ONE = {"rl.reward.fn": "a Sample", "rl.sampling.filter_fn": "a group of Samples"}


@dataclass
class CodeFindings:
    problems: list[Problem] = field(default_factory=list)
    # only so where the host's Python is not newer than this one
    syntax: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # columns that the reward needs, with its lines
    reward_keys: dict[str, int] = field(default_factory=dict)


def dotted_names(config: Config) -> dict[str, str]:
    """Return the dotted paths that the run will use, by field."""
    rl = config.rl
    if rl is None or "rl" not in config.stages or not config.uses_engine:
        return {}
    agent = rl.agent.environment if rl.agent else None
    named = {
        "rl.reward.fn": rl.reward_fn,
        "rl.sampling.filter_fn": rl.sampling.filter_fn,
        "rl.agent.environment": agent,
    }
    return {name: path for name, path in named.items() if path is not None}


def look_at_code(
    config: Config, sent: SentFiles, requirements: Sequence[str], package: SentFiles | None = None
) -> CodeFindings:
    """Return everything that can be known of the config's dotted names without importing anything.

    `package`: the files of rollouts itself, where they are not among those of the repository.
    """
    found = CodeFindings()
    on_host = any(part.startswith("/") for part in config.host.env.get("PYTHONPATH", "").split(":"))
    reader = _Reader(sent, _search_path(config), requirements, found, searches_host=on_host)
    ours = reader
    if package is not None:
        reader.comes_last, reader.may_install = True, bool(config.host.requirements)
        ours = _Reader(package, [""], requirements, found, searches_host=False, place="rollouts")
    for name, path in dotted_names(config).items():
        if not reader.refuse_same_name(name, path):
            (ours if _is_ours(path) else reader).check(name, path)
    reward = config.rl.reward_fn if config.rl and "rl.reward.fn" in dotted_names(config) else None
    if reward is not None:
        found.reward_keys = BUILT_IN_KEYS.get(reward) or (
            ours if _is_ours(reward) else reader
        ).keys_of(reward)
    return found


def _is_ours(dotted: str) -> bool:
    return dotted.partition(".")[0] == OWN_PACKAGE


def _search_path(config: Config) -> list[str]:
    """Return folders of the tree that the trainer imports from: its root, and what host.env's PYTHONPATH adds."""
    more = config.host.env.get("PYTHONPATH", "").split(":")
    return [
        "",
        *(part.strip("/").removeprefix("./") for part in more if part and not part.startswith("/")),
    ]


@dataclass
class _Reader:
    sent: SentFiles
    search: list[str]
    requirements: Sequence[str]
    found: CodeFindings
    searches_host: (
        bool  # host.env's PYTHONPATH has folders of the host, which cannot be looked at from here
    )
    place: str = "the repository"  # what `sent` are the files of
    comes_last: bool = (
        False  # modules of the same name that are installed, or Python's own, come first
    )
    may_install: bool = (
        True  # the environment may hold modules that no requirement tells the name of
    )
    modules: dict[str, Module | None] = field(default_factory=dict)  # by file

    def refuse_same_name(self, config_field: str, dotted: str) -> bool:
        """Note a problem where another module than the repository's would be imported; return whether it is so."""
        name = dotted.rpartition(".")[0]
        where = self._find(name) if self.comes_last else None
        problem = where and same_name_problem(
            f"{config_field}={dotted!r}", name, where, self.requirements
        )
        self.found.problems += [problem] if problem else []
        return problem is not None

    def check(self, config_field: str, dotted: str) -> None:
        """Check one dotted path: it adds a problem, a note, or nothing."""
        name, _, attribute = dotted.rpartition(".")
        where = self._find(name)
        if self._is_installed(name):
            return
        if where is None:
            self._missing_module(config_field, dotted, name)
        elif where.state == "not sent":
            self._add_unsent(f"{config_field}={dotted!r}", where)
        elif where.file in self.sent.folders:
            self._add(
                f"{config_field}={dotted!r}: {name} is a folder without an __init__.py.",
                fix="name a module in it",
            )
        else:
            self._check_name(config_field, dotted, where.file, name, attribute)

    def _check_name(
        self, config_field: str, dotted: str, file: str, name: str, attribute: str
    ) -> None:
        module = self._read(file, name)
        if module is None:
            return
        source = self._defines(module, attribute, {file})
        if source is None:
            near = difflib.get_close_matches(attribute, module.names, n=3, cutoff=0.5)
            public = [known for known in module.names if not known.startswith("_")]
            shown = [f"{known} (line {module.names[known]})" for known in near or public[:8]]
            inside = sorted(m for m in self._module_names() if m.startswith(f"{name}."))
            shown = (
                shown or [f"its modules {', '.join(inside[:8])}"] if inside and not near else shown
            )
            self._add(
                f"{config_field}={dotted!r}: {file} defines no {attribute!r}.",
                found=f"{'near' if near else 'it defines'}: {', '.join(shown) or 'nothing'}",
                fix=f"write {name}.{near[0]}" if near else f"define it in {file}, or name another",
            )
        elif attribute in module.constants:
            line = module.names[attribute]
            self._add(
                f"{config_field}={dotted!r} is not a function.",
                found=f"{file}:{line}: it is a plain value",
            )
        elif config_field in TAKES_ONE and source is module and attribute in module.functions:
            self._check_arguments(config_field, dotted, file, module.functions[attribute])
        self._follow(file, name)

    def _check_arguments(
        self,
        config_field: str,
        dotted: str,
        file: str,
        function: ast.FunctionDef | ast.AsyncFunctionDef,
    ) -> None:
        if not function.decorator_list and not takes_one_argument(function):
            self._add(
                f"{config_field}={dotted!r} cannot be called with {TAKES_ONE[config_field]} alone.",
                found=f"{file}:{function.lineno}: {function.name}({ast.unparse(function.args)})",
                fix="give its other arguments defaults, or name a function of one argument",
            )

    def _defines(self, module: Module, attribute: str, seen: set[str]) -> Module | None:
        """Return the module that makes `attribute`; re-exported names are looked up where they come from."""
        if attribute not in module.names:
            return module if module.is_open else None
        source, original = module.imported.get(attribute, ("", ""))
        where = self._find(source) if source else None
        if (
            where is None
            or where.state != "sent"
            or where.file in seen
            or where.file in self.sent.folders
        ):
            return module
        if self._find(f"{source}.{original}") is not None:
            return module  # a module
        inner = self._read(where.file, source)
        return module if inner is None else self._defines(inner, original, seen | {where.file})

    def keys_of(self, dotted: str) -> dict[str, int]:
        """Return the columns that a reward function takes from its prompt's row."""
        name, _, attribute = dotted.rpartition(".")
        where = self._find(name)
        if where is None or where.state != "sent" or where.file in self.sent.folders:
            return {}
        module = self._read(where.file, name)
        function = module.functions.get(attribute) if module else None
        return required_keys(function) if function else {}

    def _follow(self, file: str, name: str) -> None:
        """Return modules that are imported from here on, and lie here without being sent."""
        todo, seen = [(file, name)], set[str]()
        while todo and len(seen) < MODULES_MAX:
            file, name = todo.pop()
            module = self._read(file, name)
            if module is None or file in seen or name.split(".")[0] == OWN_PACKAGE:
                continue
            seen.add(file)
            for imported, line in module.imports:
                where = self._find(imported)
                if (
                    self.comes_last
                    and where
                    and self._is_hidden(f"{file}:{line} imports {imported}", imported, where)
                ):
                    continue
                if (
                    where is not None
                    and where.state == "not sent"
                    and not self._is_installed(imported)
                ):
                    self._add_unsent(f"{file}:{line} imports {imported}:", where)
                elif (
                    where is not None
                    and where.state == "sent"
                    and where.file not in self.sent.folders
                ):
                    todo.append((where.file, imported))

    def _is_hidden(self, who: str, name: str, where: Located) -> bool:
        """Return whether another module than the repository's is imported. It is said: as a problem where rollouts has
        no such module, else as a note: `import random` mostly means Python's."""
        problem = same_name_problem(who, name, where, self.requirements)
        if problem is not None and _is_ours(name) and not _ships_with_us(name):
            self.found.problems.append(problem)
        elif problem is not None:
            self.found.notes.append(f"{problem.message} {problem.found}")
        return problem is not None

    # --- finding and reading ----------------------------------------------------------------------------------------

    def _find(self, name: str) -> Located | None:
        """Return the file of a module in the tree, sent or not; None if it is not here."""
        folder: Located | None = None
        for base in self.search:
            path = "/".join(filter(None, [base, *name.split(".")]))
            for candidate in (f"{path}/__init__.py", f"{path}.py"):
                where = self.sent.locate(candidate)
                if where.state != "missing" and (
                    where.why or (self.sent.root / candidate).is_file()
                ):
                    return where
            where = self.sent.locate(path)
            if folder is None and where.state == "sent" and where.file in self.sent.folders:
                folder = where
        return folder

    def _is_installed(self, name: str) -> bool:
        """Return whether it belongs to a required package.

        A folder without an __init__.py does not hide that, nor does a file that is not sent.
        """
        top = name.partition(".")[0]
        where = self._find(top)
        hidden = where is not None and where.state == "sent" and where.file not in self.sent.folders
        return top.lower() in distribution_names(self.requirements) and (
            self.comes_last or not hidden
        )

    def _read(self, file: str, name: str) -> Module | None:
        if file not in self.modules:
            package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
            try:
                self.modules[file] = read_module((self.sent.root / file).read_bytes(), package)
            except SyntaxError as error:
                self.modules[file] = None
                text = (error.text or "").strip()
                problem = Problem(
                    f"{file}:{error.lineno}: {error.msg}", found=text, fix="correct that line"
                )
                self.found.syntax.append(problem)
            except (OSError, ValueError, RecursionError) as error:
                self.modules[file] = None
                self.found.notes.append(f"{file} could not be looked through: {error}")
        return self.modules[file]

    # --- saying -----------------------------------------------------------------------------------------------------

    def _add(self, message: str, *, found: str = "", needed: str = "", fix: str = "") -> None:
        self.found.problems.append(Problem(message, found, needed, fix))

    def _add_unsent(self, who: str, where: Located) -> None:
        reason = path_problem(where)
        assert reason is not None, where
        if not any(problem.message == reason.message for problem in self.found.problems):
            shown = "\n".join(filter(None, [who.removesuffix(":"), reason.found]))
            self._add(
                reason.message,
                found=shown,
                needed="a module among the files that git lists",
                fix=reason.fix,
            )

    def _missing_module(self, config_field: str, dotted: str, name: str) -> None:
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or (_is_ours(top) and _ships_with_us(name)):
            return
        known = sorted(self._module_names())
        is_ours = any(module.split(".")[0] == top for module in known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
        if (is_ours or near or not self.may_install) and not self.searches_host:
            self._add(
                f"{config_field}={dotted!r}: there is no module {name!r} in {self.place}.",
                found=f"near: {', '.join(near)}"
                if near
                else f"looked in {self.sent.root} for {name.replace('.', '/')}.py",
                needed="a module among the files that git lists, or one of an installed package",
                fix=f"write {near[0]}.{dotted.rpartition('.')[2]}"
                if near
                else self._fix(is_ours=is_ours),
            )
        else:
            self.found.notes.append(
                f"{config_field}={dotted!r}: {name} is not in the repository; the trainer's environment must have it"
            )

    def _fix(self, *, is_ours: bool) -> str:
        return "correct the path" + (
            "" if is_ours or self.may_install else ", or name its package in host.requirements"
        )

    def _module_names(self) -> Iterator[str]:
        for base in self.search:
            prefix = f"{base}/" if base else ""
            for file in self.sent.files:
                if file.startswith(prefix) and file.endswith(".py"):
                    yield (
                        file.removeprefix(prefix)
                        .removesuffix(".py")
                        .removesuffix("/__init__")
                        .replace("/", ".")
                    )


def _ships_with_us(name: str) -> bool:
    """Return whether it is a module of the rollouts package that this program is part of."""
    path = Path(__file__).resolve().parents[3].joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
