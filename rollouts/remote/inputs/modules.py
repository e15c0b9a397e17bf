"""Python modules as their source shows them: which names they define, and what they import. Nothing is imported."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rollouts.python_source import parsed

# calls that may define names which no parser sees
_OPENERS = {"globals", "vars", "locals", "exec", "setattr"}


@dataclass
class Module:
    """What running a module's top level defines."""

    names: dict[str, int] = field(default_factory=dict)  # name -> line
    # of them, those that are never more than a number, a text, ...
    constants: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)  # of them, those that may be anything
    # name -> (module, its name there)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    # modules, with the line; optional ones left out
    imports: list[tuple[str, int]] = field(default_factory=list)
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    is_open: bool = False  # it may define more: a star import, __getattr__, globals()[...]


def read_module(source: bytes, package: str) -> Module:
    """Parse a module of `package` ("" at the top). Raises SyntaxError or ValueError."""
    tree = parsed(source)
    module = Module()
    _read_block(module, tree.body, package, optional=False)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            module.names |= {name: node.lineno for name in node.names if name not in module.names}
            module.made |= set(node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _OPENERS
        ):
            module.is_open = True
        elif isinstance(node, ast.Attribute) and node.attr == "modules":
            module.is_open = True  # sys.modules[__name__]
    module.is_open |= "__getattr__" in module.names
    module.constants -= module.made | module.functions.keys() | module.imported.keys()
    return module


def _read_block(module: Module, body: Sequence[ast.stmt], package: str, *, optional: bool) -> None:
    for node in body:
        _read_statement(module, node, package, optional=optional)


def _read_statement(module: Module, node: ast.stmt, package: str, *, optional: bool) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        module.names[node.name] = node.lineno
        module.functions[node.name] = node
    elif isinstance(node, ast.ClassDef):
        module.names[node.name] = node.lineno
        module.made.add(node.name)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        _read_import(module, node, package, optional=optional)
    elif isinstance(node, ast.If) and _never_here(node.test):
        _read_block(module, node.orelse, package, optional=optional)
    else:
        maybe = optional or isinstance(node, ast.Try | ast.TryStar | ast.If)
        for block in _blocks(node):
            _read_block(module, block, package, optional=maybe)
        for name, line in _stored(node):
            module.names.setdefault(name, line)
        _read_constant(module, node)


def _read_import(
    module: Module, node: ast.Import | ast.ImportFrom, package: str, *, optional: bool
) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            module.names[alias.asname or alias.name.partition(".")[0]] = node.lineno
            module.made.add(alias.asname or alias.name.partition(".")[0])
        targets = [alias.name for alias in node.names]
    else:
        source = _absolute(node, package)
        targets = [source]
        for alias in node.names:
            if alias.name == "*":
                module.is_open = True
                continue
            module.names[alias.asname or alias.name] = node.lineno
            module.imported[alias.asname or alias.name] = (source, alias.name)
    if not optional:
        module.imports += [(target, node.lineno) for target in targets if target]


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
    return ".".join(filter(None, [*parents, node.module or ""]))


def _never_here(test: ast.expr) -> bool:
    """Return whether it is `if TYPE_CHECKING:` or `if __name__ == "__main__":`, which an import does not run."""
    if isinstance(test, ast.Name | ast.Attribute):
        return (test.id if isinstance(test, ast.Name) else test.attr) == "TYPE_CHECKING"
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id == "__name__"
    )


def _blocks(node: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(node, name, [])
    for inner in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
        yield inner.body


def _stored(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Return the names that a statement binds. Inner scopes bind their own; the blocks of `if` are read apart."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name, node.lineno
    scopes = (
        ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.FunctionDef
    )
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, scopes | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            yield from _stored(child)


def _read_constant(module: Module, node: ast.stmt) -> None:
    values = ast.Constant | ast.List | ast.Dict | ast.Set | ast.Tuple | ast.JoinedStr
    if isinstance(node, ast.Assign) and isinstance(node.value, values):
        module.constants |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    else:
        module.made |= {name for name, _ in _stored(node)}


def takes_one_argument(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether it can be called with one positional argument and nothing else."""
    arguments = function.args
    positional = len(arguments.posonlyargs) + len(arguments.args)
    needed = positional - len(arguments.defaults)
    named = sum(default is None for default in arguments.kw_defaults)
    return needed <= 1 and named == 0 and (positional > 0 or arguments.vararg is not None)


# --- what a reward reads --------------------------------------------------------------------------------------------


def required_keys(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, int]:
    """Return the keys that a reward takes from `sample.prompt` by subscript, with lines.

    Left out: those it asks for first, writes itself, or reads only where the row's other columns say so.
    """
    arguments = [*function.args.posonlyargs, *function.args.args]
    nodes = list(ast.walk(function))
    if not arguments or any(isinstance(node, ast.Try) or _is_suppress(node) for node in nodes):
        return {}
    sample, rows = arguments[0].arg, set[str]()
    for node in nodes:
        if isinstance(node, ast.Assign) and _is_prompt(node.value, sample, set()):
            rows |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    found, asked = list[tuple[str, ast.Subscript]](), set[str]()
    for node in nodes:
        if isinstance(node, ast.Subscript) and _is_prompt(node.value, sample, rows):
            if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
                loaded = isinstance(node.ctx, ast.Load)
                found.append((node.slice.value, node)) if loaded else asked.add(node.slice.value)
        elif isinstance(node, ast.Compare | ast.Call):
            asked |= {part.value for part in ast.walk(node) if _is_question(node, part)}  # type: ignore[attr-defined]
    line, test = _first_guard(function, nodes, sample, rows)
    certain = {
        key: node.lineno for key, node in reversed(found) if node.lineno < line or node in test
    }
    return {key: number for key, number in certain.items() if key not in asked}


def _first_guard(
    function: ast.AST, nodes: Sequence[ast.AST], sample: str, rows: set[str]
) -> tuple[float, list[ast.AST]]:
    """Return the line of the first choice that the row alone decides, and what its question is made of.

    From there on, what is read depends on what kind of row it is.
    """
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    stored = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    others = (stored | {node.arg for node in nodes if isinstance(node, ast.arg)}) - rows
    for node in sorted(assigned, key=lambda node: node.lineno):
        if _of_the_row(node.value, sample, rows, others):
            others = others - {name for target in node.targets for name, _ in _stored(target)}
    known = rows | (stored - others)
    guards = [(node.lineno, test) for node in nodes for test in _questions(node)]  # type: ignore[attr-defined]
    own = [(line, test) for line, test in guards if _of_the_row(test, sample, known, others)]
    line, test = min(own, key=lambda guard: guard[0], default=(float("inf"), None))
    return line, [] if test is None else list(ast.walk(test))


def _questions(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return [node.test]
    return (
        [node.subject]
        if isinstance(node, ast.Match)
        else node.values[:1]
        if isinstance(node, ast.BoolOp)
        else []
    )


def _of_the_row(test: ast.expr, sample: str, rows: set[str], others: set[str]) -> bool:
    """Return whether it reads the row, and none of the function's other values."""
    prompts = [
        node
        for node in ast.walk(test)
        if isinstance(node, ast.expr) and _is_prompt(node, sample, rows)
    ]
    if (
        isinstance(test, ast.Compare)
        and isinstance(test.ops[-1], ast.In | ast.NotIn)
        and test.comparators[-1] in prompts
    ):
        return True  # `name in row`, whatever the name
    own = {inner for node in prompts for inner in ast.walk(node)}
    rest = [node for node in ast.walk(test) if isinstance(node, ast.Name) and node not in own]
    return bool(prompts) and not any(node.id in others for node in rest)


def _is_suppress(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "suppress"


def _is_prompt(node: ast.expr, sample: str, rows: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in rows
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "prompt"
        and isinstance(node.value, ast.Name)
        and node.value.id == sample
    )


def _is_question(node: ast.Compare | ast.Call, part: ast.AST) -> bool:
    """Return whether it is a text in `"tests" in row`, `row.get("tests")` or `row.setdefault("tests", [])`."""
    if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
        return False
    if isinstance(node, ast.Compare):
        return part is node.left and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
    return (
        isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "setdefault")
        and part in node.args[:1]
    )
