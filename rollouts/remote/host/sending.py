"""Our own modules on their way to a host that may lack them: their source goes over stdin, before the program's input.

The tools that a person needs when something went wrong must not lie in the directory that may be gone.
"""

import ast
import base64
import functools
import importlib.util
import json
import zlib
from collections.abc import Sequence

from rollouts.python_source import parsed

_OURS = ("rollouts",)
_START = (
    "import base64, sys, zlib; exec(zlib.decompress(base64.b64decode(sys.stdin.buffer.readline())))"
)
# Runs $1 with the first Python that is new enough, the host's own first; its exit code is NO_PYTHON where there is none
_FIND = """
PATH="$PATH:$HOME/.local/bin"
for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
  "$python" -Ic 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && exec "$python" -I -c "$1"
done
exit 127
"""
NO_PYTHON = 127
_MODULES = """
import base64, json, sys, types, zlib
sources = json.loads(zlib.decompress(base64.b64decode("{packed}")))
for name in sources:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name in sources:
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, sys.modules[name])
for name, source in sources.items():
    if source is not None:
        exec(compile(source, name, "exec"), sys.modules[name].__dict__)
"""


def sent_program(python: str, module: str, *arguments: str) -> tuple[list[str], bytes]:
    """Return a command line, and the first line of its stdin: they run `module`'s main() on a host.

    `module` and all that it imports of ours may use the standard library alone.
    """
    argv = json.dumps([module, *arguments])
    program = f"{modules_program(module)}\nsys.argv = json.loads({argv!r})\nsys.modules[sys.argv[0]].main()\n"
    return [python, "-IS", "-c", _START], base64.b64encode(zlib.compress(program.encode())) + b"\n"


def sent_to_any_python(module: str, *arguments: str) -> tuple[list[str], bytes]:
    """Do `sent_program` for a host of which nothing is known yet: one round trip finds its Python too.

    Where it has none, the exit code is NO_PYTHON.
    """
    _, program = sent_program("", module, *arguments)
    return ["sh", "-c", _FIND, "sh", _START], program


def modules_program(module: str) -> str:
    """Return a program that makes `module`, and what it imports of ours, importable on a host that lacks it."""
    return _MODULES.format(
        packed=base64.b64encode(zlib.compress(sources(module).encode())).decode()
    )


@functools.cache
def sources(module: str) -> str:
    """Return JSON of {module: source} for `module` and all that it imports of ours, each after what it imports.

    A package that is imported for its modules alone has null in place of its source.
    """
    found: dict[str, str | None] = {}
    _collect(module, found, set())
    return json.dumps(found)


def _collect(module: str, found: dict[str, str | None], begun: set[str]) -> None:
    spec = importlib.util.find_spec(module)
    if module in begun or spec is None or spec.origin is None:
        return
    begun.add(module)
    for at, letter in enumerate(module):
        if letter == ".":
            found.setdefault(module[:at], None)
    with open(spec.origin, encoding="utf-8") as stream:
        source = stream.read()
    for name in _imported(source):
        _collect(name, found, begun)
    # a package was listed for its modules: its own source runs after theirs
    found.pop(module, None)
    found[module] = source


def _imported(source: str) -> Sequence[str]:
    """Return the imported modules of ours; `from rollouts import run_dir` imports one, not `rollouts` itself."""
    names: list[str] = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if _is_module(name) else node.module for name in below]
    return [name for name in dict.fromkeys(names) if _is_module(name)]


def _is_module(name: str) -> bool:
    """Return whether it is a module of ours."""
    if name.partition(".")[0] not in _OURS:
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, AttributeError):  # a name in a module that is not a package
        return False
