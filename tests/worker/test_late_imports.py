"""What the trainer imports late, and why: it must be on record, and so be stoppable, before it loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).resolve().parents[2] / "rollouts" / "worker"


def late_imports(source: str) -> list[str]:
    """Return the imports inside functions, as written."""
    tree = ast.parse(source)
    return [
        ast.unparse(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def test_the_stages_alone_are_imported_late() -> None:
    """Goal: what a trainer needs is read at the top of its files. Red with `import torch` inside `main`: listed."""
    files = [
        *WORKER.glob("trainer*.py"),
        *(WORKER / "stages").glob("*.py"),
        *(WORKER / "builders").glob("*.py"),
    ]
    found = [line for file in files for line in late_imports(file.read_text())]
    assert sorted(found) == [
        "from rollouts.worker.stages import rl",
        "from rollouts.worker.stages import sft",
    ]
    assert late_imports("def f():\n    import torch") == ["import torch"]


def test_the_entry_loads_no_torch_before_it_is_on_record() -> None:
    """Goal: `stop` finds the process in the seconds that torch takes to load. Red with a stage imported at the top."""
    code = "import sys, rollouts.worker.trainer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
