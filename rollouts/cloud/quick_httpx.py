"""httpx without what this command never uses of it: half of the time in which it is imported."""

import importlib
import sys
from types import ModuleType
from typing import cast

# httpx imports its own command line, with click and pygments; httpcore imports trio. Both go on where they are missing.
UNUSED = ("httpx._main", "trio")


def import_httpx() -> None:
    """Import httpx and httpcore. For a process that is ours alone: an event loop of trio's cannot use them then.

    Raises ImportError where they are not installed.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = cast(ModuleType, None)  # an import of it fails
    try:
        importlib.import_module("httpx")
        importlib.import_module("httpcore")
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
