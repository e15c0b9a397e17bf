"""Code of the user's: a reward, a filter, an agent's environment. Where it is found, what it may raise.

Standard library.
"""

import os
import sys
from pathlib import Path

# left to itself, `sys.exit` in a task ends the event loop, and nothing says why
USER_ERRORS = Exception, SystemExit


def describe(error: BaseException) -> str:
    """`ValueError: what (file.py:12)`, the place being the innermost."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}{place}"


def find_user_code() -> None:
    """Make modules of the working directory importable, where Python was told (PYTHONSAFEPATH) not to look there first.

    It is told so where rollouts lies beside the user's repository. Its modules come last: a `random.py` or `datasets/`
    in it hides no module that training needs. What the user's code starts finds its modules as it always does.
    """
    if sys.flags.safe_path:
        sys.path.append(os.getcwd())
        os.environ.pop("PYTHONSAFEPATH", None)


def hiding_module(name: str) -> str:
    """Return the file of the module that Python takes in place of the repository's own `name`; "" for none."""
    top, here = name.partition(".")[0], Path.cwd()
    own = here / f"{top}.py", here / top / "__init__.py"
    taken = getattr(sys.modules.get(top), "__file__", None)
    is_hidden = sys.flags.safe_path and taken and any(file.is_file() for file in own)
    return str(taken) if is_hidden and not Path(str(taken)).is_relative_to(here) else ""
