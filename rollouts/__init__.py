"""`rollouts`: post-training of language models as one command. Importing it loads nothing: names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollouts.agents.endpoint import Endpoint
    from rollouts.agents.environment import CalculatorEnvironment

_MODULE_OF = {
    "CalculatorEnvironment": "rollouts.agents.environment",
    "Endpoint": "rollouts.agents.endpoint",
}

__all__ = ["CalculatorEnvironment", "Endpoint"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
