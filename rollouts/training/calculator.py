"""A calculator that is safe to hand to a model. Pure; standard library only.

It knows nanochat's two kinds of expressions: numbers with + - * / // and brackets, and how often one string occurs in
another, `'strawberry'.count('r')`. The text is parsed and its tree walked; nothing is ever executed. nanochat limits
the time to 3 s. Here the length does: without powers, MAX_CHARACTERS cannot make a number of more digits than that.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 256
ARITHMETIC = re.compile(r"[0-9+\-*/.() ]+")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class _NotAllowed(ValueError):
    """A part of an expression that this calculator does not support."""


def calculate(expression: str) -> str | None:
    """Return the value as text: "24" for "48/2", "0.3" for "0.1+0.2" (10 digits), "1200" for "1,000 + 200".

    Commas in numbers are dropped. Other expressions than the above, a division by zero and an overflow give None.
    """
    text = expression.strip()
    if not text or len(text) > MAX_CHARACTERS:
        return None
    is_count = text[0] in "'\""
    if not is_count:
        text = text.replace(",", "")
        if not ARITHMETIC.fullmatch(text) or "**" in text:
            return None
    try:
        tree = ast.parse(text, mode="eval").body
        value = _count(tree) if is_count else _number(tree)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return _format(value)


def _number(node: ast.expr) -> int | float:
    # no True: ARITHMETIC has no letters
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_number(node.left), _number(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_number(node.operand))
    raise _NotAllowed


def _count(node: ast.expr) -> int:
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise _NotAllowed


def _format(value: int | float) -> str | None:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
