"""Which arguments a reward function can see at all: the others need not be sent to a worker.

Every function is called with all there is (prompts, token ids, the dataset's columns), and most take two or three by
name and the rest as `**kwargs`, which they never look at. Token ids alone cost more to send than many a reward takes.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

# Calls by which a function reads its variables without naming them
_LOOKS_AROUND = frozenset({"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "stack", "trace"})


def readable_arguments(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the keyword arguments that a function can read, or None if that may be any.

    Not None for a Python function (method, callable object, `functools.partial` of one) whose code takes `**kwargs` and
    does not touch them. One without `**kwargs` may read any too: it must go on raising at arguments it does not know.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, (FunctionType, MethodType)):
        function = getattr(type(function), "__call__", function)  # noqa: B004 (the method, not whether there is one)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS or _LOOKS_AROUND & set(code.co_names):
        return None
    named = code.co_argcount + code.co_kwonlyargcount
    rest = code.co_varnames[named + bool(code.co_flags & inspect.CO_VARARGS)]
    return None if _touches(code, rest) else frozenset(code.co_varnames[:named])


def _touches(code: CodeType, variable: str) -> bool:
    """Whether the code, or a function defined in it, has an instruction on one of its local variables."""
    if variable in code.co_cellvars:
        return True
    operands = (instruction.argval for instruction in dis.get_instructions(code) if "FAST" in instruction.opname)
    return any(variable in operand if isinstance(operand, tuple) else variable == operand for operand in operands)
