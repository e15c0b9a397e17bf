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

_OURS = ("rollouts", "base_config")
_START = "import base64, sys, zlib; exec(zlib.decompress(base64.b64decode(sys.stdin.buffer.readline())))"
_PROGRAM = """
import json, sys, types
sources = json.loads({sources!r})
for name, source in sources.items():
    sys.modules[name] = types.ModuleType(name)
    if source is None:
        sys.modules[name].__path__ = []
for name, source in sources.items():
    if source is not None:
        exec(compile(source, name, "exec"), sys.modules[name].__dict__)
sys.argv = json.loads({argv!r})
sys.modules[sys.argv[0]].main()
"""


def sent_program(python: str, module: str, *arguments: str) -> tuple[list[str], bytes]:
    """(a command line, the first line of its stdin) that run `module`'s main() with these arguments on a host.

    `module` and all that it imports of ours may use the standard library alone.
    """
    program = _PROGRAM.format(sources=_sources(module), argv=json.dumps([module, *arguments]))
    return [python, "-I", "-c", _START], base64.b64encode(zlib.compress(program.encode())) + b"\n"


@functools.cache
def _sources(module: str) -> str:
    """{module: source, or null for a package} of it and all that it imports of ours, each after what it imports."""
    found: dict[str, str | None] = {}
    _collect(module, found)
    return json.dumps(found)


def _collect(module: str, found: dict[str, str | None]) -> None:
    for at, letter in enumerate(module):
        if letter == ".":
            found.setdefault(module[:at], None)
    spec = importlib.util.find_spec(module)
    if module in found or spec is None or spec.origin is None:
        return
    if spec.submodule_search_locations is not None:
        found[module] = None
        return
    with open(spec.origin, encoding="utf-8") as stream:
        source = stream.read()
    for name in _imported(source):
        _collect(name, found)
    found[module] = source


def _imported(source: str) -> Sequence[str]:
    """Names that may be modules of ours; `from rollouts import run_dir` names two."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    ours = [name for name in names if name.split(".")[0] in _OURS]
    return [name for name in dict.fromkeys(ours) if _is_module(name)]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, AttributeError):  # a name in a module that is no package
        return False
