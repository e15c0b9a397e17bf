"""Parses Python, one thread at a time. Standard library only.

Python before 3.11.5 may fail where two threads parse at once: "AST constructor recursion depth mismatch"
(github.com/python/cpython/issues/106905).
"""

import ast
import inspect
import threading

_ONE_AT_A_TIME = threading.Lock()


def parsed(source: str | bytes) -> ast.Module:
    """Return a module's tree. Raises as ast.parse does."""
    with _ONE_AT_A_TIME:
        return ast.parse(source)


def parsed_expression(text: str) -> ast.expr:
    """Return an expression's tree. Raises as ast.parse does."""
    with _ONE_AT_A_TIME:
        return ast.parse(text, mode="eval").body


def class_source(kind: type) -> str:
    """Return the lines of a class, which inspect parses its file for. Raises OSError."""
    with _ONE_AT_A_TIME:
        return inspect.getsource(kind)
