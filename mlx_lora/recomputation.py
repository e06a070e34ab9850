"""What a block keeps for its backward pass while it runs again for all the rest."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

Gradients = Callable[[Any, Any, Any], Sequence[mx.array]]


class FirstRun:
    """What `remember` found in the first run of a block, in order, for the block's other runs."""

    def __init__(self) -> None:
        self._results: list[tuple[mx.array, ...]] = []
        self._recorded = False
        self._next = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, `remember` notes results the first time and reads them every other time."""
        self._next = 0
        token = _first_run.set(self)
        try:
            yield
        finally:
            _first_run.reset(token)
            self._recorded = True

    def result(self, find: Callable[[], tuple[mx.array, ...]]) -> tuple[tuple[mx.array, ...], bool]:
        """The next result, and whether it was here already."""
        if not self._recorded:
            self._results.append(find())
        self._next += 1
        return self._results[self._next - 1], self._recorded


_first_run: ContextVar[FirstRun | None] = ContextVar("first_run", default=None)


@contextmanager
def forgotten() -> Iterator[None]:
    """Inside, `remember` computes everything anew."""
    token = _first_run.set(None)
    try:
        yield
    finally:
        _first_run.reset(token)


def remember(function: Callable[..., Any], *inputs: mx.array, gradients: Gradients | None = None) -> Any:
    """``function(*inputs)``, an array or a tuple of them, which a block that runs again does not compute again.

    The gradient to the inputs is the function's own, taken where they are then; it is free where, as in a matrix
    product, it does not need the result. `gradients`, where it does: (inputs, cotangents, results) → gradients.
    """
    first = _first_run.get()
    if first is None:
        return function(*inputs)

    def results(*inputs: mx.array) -> tuple[mx.array, ...]:
        found = function(*inputs)
        return found if isinstance(found, tuple) else (found,)

    found, known = first.result(lambda: results(*inputs))
    if known:

        @mx.custom_function
        def of_first_run(found: tuple[mx.array, ...], inputs: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
            return found

        @of_first_run.vjp
        def pull_back(primals: Any, cotangents: Any, _: Any) -> Any:
            found, inputs = primals
            if gradients is not None:
                by_inputs = gradients(inputs, cotangents, found)
            else:
                by_inputs = mx.vjp(lambda *inputs: list(results(*inputs)), list(inputs), list(cotangents))[1]
            return tuple(map(mx.zeros_like, found)), tuple(by_inputs)

        found = of_first_run(found, inputs)
    return found if len(found) > 1 else found[0]
