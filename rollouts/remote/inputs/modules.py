"""Python modules as their source shows them: which names they define, and what they import. Nothing is imported."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_OPENERS = {"globals", "vars", "locals", "exec", "setattr"}  # calls that may define names which no parser sees


@dataclass
class Module:
    """What running a module's top level defines."""

    names: dict[str, int] = field(default_factory=dict)  # name -> line
    constants: set[str] = field(default_factory=set)  # of them, those that are a number, a text, a list, ...
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (module, its name there)
    imports: list[tuple[str, int]] = field(default_factory=list)  # modules, with the line; optional ones left out
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    is_open: bool = False  # it may define more: a star import, __getattr__, globals()[...]


def read_module(source: bytes, package: str) -> Module:
    """Parse a module of `package` ("" at the top). Raises SyntaxError or ValueError."""
    tree = ast.parse(source)
    module = Module()
    _read_block(module, tree.body, package, optional=False)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            module.names |= {name: node.lineno for name in node.names if name not in module.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OPENERS:
            module.is_open = True
        elif isinstance(node, ast.Attribute) and node.attr == "modules":
            module.is_open = True  # sys.modules[__name__]
    module.is_open |= "__getattr__" in module.names
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


def _read_import(module: Module, node: ast.Import | ast.ImportFrom, package: str, *, optional: bool) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            module.names[alias.asname or alias.name.partition(".")[0]] = node.lineno
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
    """`if TYPE_CHECKING:` and `if __name__ == "__main__":` do not run when the module is imported."""
    if isinstance(test, ast.Name | ast.Attribute):
        return (test.id if isinstance(test, ast.Name) else test.attr) == "TYPE_CHECKING"
    return isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "__name__"


def _blocks(node: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(node, name, [])
    for inner in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
        yield inner.body


def _stored(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a statement binds. Inner scopes bind their own; the blocks of `if` are read apart."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name, node.lineno
    scopes = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.FunctionDef
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, scopes | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            yield from _stored(child)


def _read_constant(module: Module, node: ast.stmt) -> None:
    values = ast.Constant | ast.List | ast.Dict | ast.Set | ast.Tuple | ast.JoinedStr
    if isinstance(node, ast.Assign):
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        module.constants = module.constants | names if isinstance(node.value, values) else module.constants - names


# --- what a reward reads --------------------------------------------------------------------------------------------


def required_keys(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, int]:
    """The keys that a reward takes from `sample.prompt` by subscript, with lines; those it asks for first left out."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    if not arguments:
        return {}
    sample, rows = arguments[0].arg, set[str]()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _is_prompt(node.value, sample, set()):
            rows |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    found, asked = dict[str, int](), set[str]()
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_prompt(node.value, sample, rows):
            if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
                found.setdefault(node.slice.value, node.lineno)
        elif isinstance(node, ast.Compare | ast.Call):
            asked |= {part.value for part in ast.walk(node) if _is_question(node, part)}  # type: ignore[attr-defined]
    if any(isinstance(node, ast.Try) for node in ast.walk(function)):
        return {}
    return {key: line for key, line in found.items() if key not in asked}


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
    """A text in `"tests" in row` or `row.get("tests")`."""
    if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
        return False
    if isinstance(node, ast.Compare):
        return part is node.left and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
    return isinstance(node.func, ast.Attribute) and node.func.attr == "get" and part in node.args[:1]
