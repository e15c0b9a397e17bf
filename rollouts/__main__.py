"""`deploy CONFIG`, `rollouts CONFIG` and `python -m rollouts CONFIG` are one command: that of deploy.py."""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the deploy.py that lies beside this package, whichever other one Python would find first."""
    file = Path(__file__).resolve().parent.parent / "deploy.py"
    spec = importlib.util.spec_from_file_location("deploy", file)
    assert spec is not None and spec.loader is not None
    sys.modules["deploy"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


if __name__ == "__main__":
    main()
