"""Causal attention in blocks of queries, also of packed rows: exact, and without probabilities that stay alive.

`mx.fast.scaled_dot_product_attention` keeps all T x T probabilities of a layer for the backward pass, on a CPU always
and on a GPU wherever the mask is an array. Here a block of queries sees only the keys that it may, and the backward
pass computes its probabilities again from the logarithm of their sum (Dao et al., 2022, arXiv:2205.14135).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_lora.errors import InputError
from mlx_lora.exponential import exp
from mlx_lora.recomputation import remember
from mlx_lora.substitution import substitute

NAME = scaled_dot_product_attention.__name__
BLOCK = 128  # queries; on a CPU half of it is as fast up to 1,024 keys


def causal_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    segments: mx.array | None = None,
    window: int | None = None,
) -> mx.array:
    """softmax(scale · queries keysᵀ) values, each position attending to itself and those before it.

    Args:
        queries: (B, H, T, D); any T.
        keys, values: (B, K, T, D), each head of them shared by H / K heads of the queries.
        scale: factor of the products.
        segments: (B, T) int32, the document of each position: it attends inside its document only.
        window: the length of the longest document, or more; keys further back are not looked at.

    Returns:
        (B, H, T, D)
    """
    length, shared = queries.shape[2], keys.shape[1]
    window = length if window is None else min(window, length)
    block = BLOCK // 2 if mx.default_device() == mx.cpu and window <= 1024 else BLOCK
    blocks = [(max(0, first - window), first, min(first + block, length)) for first in range(0, length, block)]

    def rows(x: mx.array, first: int, last: int) -> mx.array:
        """(B, H, T, D) → (B, K, H / K · queries of a block, D): heads that share keys are rows of one product."""
        return x[:, :, first:last].reshape(x.shape[0], shared, -1, x.shape[3])

    def heads(x: mx.array, first: int, last: int) -> mx.array:
        return x.reshape(x.shape[0], -1, last - first, x.shape[3])

    def scores(q: mx.array, k: mx.array, start: int, first: int, last: int) -> mx.array:
        """The logarithms of a block's probabilities, up to a constant for each query; -inf where it may not look."""
        visible = mx.arange(first, last)[:, None] >= mx.arange(start, last)
        if segments is not None:
            same = segments[:, first:last, None] == segments[:, None, start:last]
            visible = (visible & same)[:, None, None]
        products = ((scale * q) @ k.swapaxes(-1, -2)).astype(mx.float32)  # scaled first: float16 ends at 65,504
        masked = mx.unflatten(products, 2, (-1, last - first)) + mx.where(visible, 0.0, -mx.inf)
        return mx.flatten(masked, 2, 3)

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The result, and the logarithm of each query's sum, (B, H, T, 1) float32."""
        results: list[mx.array] = []
        normalizers = []
        for start, first, last in blocks:
            q = rows(queries, first, last)
            if results:  # one block after the other, or the scheduler holds several in memory
                q = mx.depends(q, results[-1])
            x = scores(q, keys[:, :, start:last], start, first, last)
            highest = x.max(axis=-1, keepdims=True)
            p = exp(x - highest)
            total = p.sum(axis=-1, keepdims=True)
            mixed = (p.astype(values.dtype) @ values[:, :, start:last]) / total
            results.append(heads(mixed.astype(queries.dtype), first, last))
            normalizers.append(heads(highest + mx.log(total), first, last))
        return mx.concatenate(results, axis=2), mx.concatenate(normalizers, axis=2)

    def gradients(
        inputs: tuple[mx.array, mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        queries, keys, values = inputs
        by_queries: list[mx.array] = []
        finished: list[list[mx.array]] = [[], []]  # of keys and values that no later block sees
        seen = [mx.zeros((*x.shape[:2], 0, x.shape[3]), mx.float32) for x in (keys, values)]
        for start, first, last in blocks:
            q, cotangent, result, normalizer = (
                rows(x, first, last) for x in (queries, cotangents[0], outputs[0], outputs[1])
            )
            # also on the first one: else mx.compile would take the scores of the forward pass, and so keep them
            earlier = [by_queries[-1], *seen] if by_queries else [cotangents[0]]
            q, cotangent = mx.depends([q, cotangent], earlier)
            k, v = keys[:, :, start:last], values[:, :, start:last]
            p = exp(scores(q, k, start, first, last) - normalizer)
            mean = (cotangent.astype(mx.float32) * result).sum(axis=-1, keepdims=True)
            by_scores = (p * (cotangent @ v.swapaxes(-1, -2) - mean)).astype(q.dtype)
            by_queries.append(heads(scale * (by_scores @ k), first, last))
            more = by_scores.swapaxes(-1, -2) @ (scale * q), p.astype(q.dtype).swapaxes(-1, -2) @ cotangent
            passed = start - (first - seen[0].shape[2])
            for side in (0, 1):
                if passed > 0:
                    finished[side].append(seen[side][:, :, :passed])
                    seen[side] = seen[side][:, :, passed:]
                seen[side] = mx.pad(seen[side], [(0, 0), (0, 0), (0, last - first), (0, 0)]) + more[side]
        by_keys, by_values = (mx.concatenate([*finished[side], seen[side]], axis=2) for side in (0, 1))
        return mx.concatenate(by_queries, axis=2), by_keys.astype(keys.dtype), by_values.astype(values.dtype)

    attend.vjp(gradients)
    if values.dtype != queries.dtype:  # some models widen the queries on purpose
        values = values.astype(mx.result_type(queries, values))
    return remember(attend, queries, keys, values, gradients=gradients)[0]


class Attention:
    """The attention of one model, whose modules call `causal_attention` where that is better than what they called.

    That is on a CPU wherever the mask is causal, and everywhere inside `packed`. Where there is a KV cache, another
    mask or attention sinks, they call what mlx-lm calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._segments: mx.array | None = None
        self._window: int | None = None

    @classmethod
    def install(cls, model: nn.Module) -> "Attention":
        """Makes the attention modules of `model` use it, once; their classes stay as they are for every other model."""
        attention = cls(model)
        substitute(model, NAME, scaled_dot_product_attention, attention._attend)
        return attention

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        plain = cache is None and sinks is None and queries.shape[2] == keys.shape[2]
        causal = isinstance(mask, str) and mask == "causal"
        if plain and causal and (self._segments is not None or mx.default_device() == mx.cpu):
            return causal_attention(queries, keys, values, scale, self._segments, self._window)
        if self._segments is not None and queries.shape[2] > 1:
            raise InputError("its attention is not plainly causal (a sliding window, sinks, or a mask of its own)")
        return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    @contextmanager
    def packed(self, segments: mx.array, window: int) -> Iterator[None]:
        """Inside, the model's input (B, T) holds several documents a row, and attention stays inside each.

        Gradients are to be taken inside too: a checkpointed block runs again then.

        Args:
            segments: (B, T) int32, the document of each position; padding may be one too.
            window: the length of the longest document, or more. Each value is another trace.

        Raises:
            InputError: from the model's forward pass, where a mask other than the causal one is asked for.
        """
        self._segments, self._window = segments, window
        try:
            yield
        finally:  # no tracer stays here
            self._segments = self._window = None

    def why_not_packed(self, length: int) -> str | None:
        """Why lines of `length` tokens that hold several documents would give other results than the documents alone;
        None where they would not.

        Found by trying: a document must not see the one before it (by whatever the model has: attention that was not
        replaced, convolutions, recurrent states), nor how far along the row it is.
        """
        body = self._model.model if "model" in self._model else self._model
        first, second = mx.arange(8)[None], mx.arange(8, 20)[None]
        filler = mx.arange(max(8, length - 12))[None] % 20

        def after(before: mx.array) -> mx.array:
            """What is found for the second document behind another one."""
            ids = mx.concatenate([before, second], axis=1)
            with self.packed((mx.arange(ids.shape[1]) >= before.shape[1])[None].astype(mx.int32), 128):
                return body(ids)[:, -12:]

        try:
            if not mx.array_equal(after(first), after(first[:, ::-1])).item():
                return "its documents would see one another"
            alone, far = body(second), after(filler)
        except InputError as error:
            return str(error)
        if not mx.abs(far - alone).max().item() <= 0.05 * mx.abs(alone).max().item():
            return "its positions are absolute"
        return None

    def require_packed(self, path: str, length: int) -> None:
        """Raises InputError where the model of this path cannot take packed rows in lines of `length` tokens."""
        if why := self.why_not_packed(length):
            raise InputError(f"data.packing: {path} takes no packed rows: {why}; set it to false")
