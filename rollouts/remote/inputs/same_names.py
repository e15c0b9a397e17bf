"""Modules of the user's repository that have the name of another one.

Where rollouts lies beside the repository, Python looks there last (`find_user_code`): after rollouts, its own modules
and what is installed.
"""

import re
import sys
from collections.abc import Iterable

from rollouts.remote.errors import Problem
from rollouts.remote.inputs.paths import Located

OWN_PACKAGE = "rollouts"


def distribution_names(requirements: Iterable[str]) -> set[str]:
    """Return the names that these requirements have as modules, as far as both are alike."""
    return {
        re.split(r"[^\w.-]", line.strip())[0].lower().replace("-", "_") for line in requirements
    }


def whose_module(top: str, requirements: Iterable[str]) -> str:
    """Return who has a module of this name, before the user's repository is looked into; "" for nobody."""
    if top == OWN_PACKAGE:
        return "rollouts, which runs there,"
    if top in sys.stdlib_module_names:
        return "Python itself"
    return f"the package {top}" if top.lower() in distribution_names(requirements) else ""


def same_name_problem(
    who: str, name: str, where: Located, requirements: Iterable[str]
) -> Problem | None:
    """Return why `name`, which lies at `where` in the repository, is another module on the host; None where it is it.

    `who` names it, such as "rl.reward.fn='random.score'".
    """
    top = name.partition(".")[0]
    other = whose_module(top, requirements)
    if not other or not where.file.endswith(".py"):
        return None
    return Problem(
        f"{who}: your repository and {other} have a module {top!r}.",
        found=f"{where.file}; the other one is imported, since it is looked for first",
        needed="a name that only your repository has",
        fix=f"rename it in your repository, for example to my_{top}",
    )
