"""One module of a model calls our function where its code calls one of mlx-lm's; no class changes for other models."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.nn as nn


def substitute(model: nn.Module, name: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Every module of `model` whose `__call__` uses the global `name`, meaning `theirs`, uses `ours` there from now on.

    It gets a subclass of its class, of the same name, whose `__call__` is the same code with that one global changed.
    """
    for module in model.modules():
        call: Any = type(module).__call__
        code = getattr(call, "__code__", None)
        if code and name in code.co_names and call.__globals__.get(name) is theirs:
            module.__class__ = _subclass(type(module), call, {name: ours})


def _subclass(kind: type[nn.Module], call: FunctionType, changed: dict[str, Any]) -> type[nn.Module]:
    ours = FunctionType(
        call.__code__, {**call.__globals__, **changed}, call.__name__, call.__defaults__, call.__closure__
    )
    ours.__kwdefaults__ = call.__kwdefaults__
    return type(
        kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__call__": ours}
    )
