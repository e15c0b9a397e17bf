"""What code of a user's own may raise: a reward, a filter, an agent's environment. Standard library."""

USER_ERRORS = (Exception, SystemExit)  # left to itself, `sys.exit` in a task ends the event loop, and nothing says why


def describe(error: BaseException) -> str:
    """`ValueError: what (file.py:12)`, the place being the innermost."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}{place}"
