"""Token cross-entropy in float32, and its sum over a batch, formed in parts."""

from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_lora.batches import Batch
from mlx_lora.exponential import exp
from mlx_lora.head import Head, Output

Arrays = dict[str, Any]
POSITIONS = 1024  # whose logits are computed at a time
LOWEST = -3e38  # a float32 below every logit


def token_loss(
    logits: mx.array, targets: mx.array, label_smoothing: float = 0.0
) -> tuple[mx.array, mx.array, mx.array]:
    """Cross-entropy of each position (...), and what its gradient is made of: exp(logits - highest) (..., K), and the
    sum of these (...); all float32.

    With smoothing a the target is (1 - a) · one-hot + a / K over the K tokens of the vocabulary (Szegedy et al.,
    2015, arXiv:1512.00567).

    Args:
        logits: (..., K), of any floating type; the reduction is in float32.
        targets: (...) token ids.
        label_smoothing: a, in [0, 1).
    """
    logits = logits.astype(mx.float32)
    highest = logits.max(axis=-1, keepdims=True)
    powers = exp(logits - highest)
    total = _sum(powers)
    normalizer = highest.squeeze(-1) + mx.log(total)
    loss = normalizer - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    if label_smoothing > 0:
        mean = _sum(logits) / logits.shape[-1]
        loss = (1 - label_smoothing) * loss + label_smoothing * (normalizer - mean)
    return loss, powers, total


def _sum(values: mx.array) -> mx.array:
    """Over the last axis in two stages: on a CPU, MLX adds a row up term by term in float32 (`mx.logsumexp` too), which
    is off by 1e-5 at 50,000 terms and more than that beyond."""
    whole = values.shape[-1] // 512 * 512
    first = mx.unflatten(values[..., :whole], -1, (512, -1)).sum(axis=-2).sum(axis=-1)
    return first + values[..., whole:].sum(axis=-1)


def loss_sum(logits: mx.array, targets: mx.array, mask: mx.array, label_smoothing: float = 0.0) -> mx.array:
    """The sum of the token losses, each times its `mask`; 0 where nothing is supervised.

    A step's mask is 1 over the supervised tokens of the whole update, or 0, so that the result does not depend on how
    rows are padded or split into micro-batches. The gradient is the closed form mask · (softmax - target), made of
    the exponentials of the forward pass: they are the costliest part of it on a CPU.
    """
    vocabulary, kind = logits.shape[-1], logits.dtype

    @mx.custom_function
    def total(logits: mx.array, targets: mx.array, mask: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        loss, powers, normalizer = token_loss(logits, targets, label_smoothing)
        return mx.where(mask > 0, mask * loss, 0).sum(), powers, normalizer

    @total.vjp
    def pull_back(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        _, targets, mask = primals
        _, powers, normalizer = outputs
        weight = (mask * cotangents[0])[..., None]
        chosen = mx.arange(vocabulary) == targets[..., None]
        wanted = mx.where(chosen, 1 - label_smoothing, 0) + label_smoothing / vocabulary
        gradient = mx.where(weight != 0, weight * (powers / normalizer[..., None] - wanted), 0).astype(kind)
        return gradient, mx.zeros_like(targets), mx.zeros_like(mask)

    return total(logits, targets, mask)[0]


def head_loss_sum(
    head: Head, hidden: mx.array, targets: mx.array, mask: mx.array, label_smoothing: float = 0.0, *, chunk: int
) -> mx.array:
    """`loss_sum` of ``head(hidden)`` with the logits of `chunk` positions and `part_size` tokens in memory at a time.

    The gradient to `hidden` is formed in the forward pass, where the logits are at hand (as in Liger kernels,
    arXiv:2410.10989): none are kept for the backward pass or computed again in it. There is none to the head's own
    parameters, so the head has to be frozen. Parts are ordered by `mx.depends`: else MLX may start on all at once.

    Args:
        hidden: (N, D).
        targets: (N,) token ids.
        mask: (N,), how much each target counts.
        chunk: positions, at least 1.
    """

    @mx.custom_function
    def total(hidden: mx.array, targets: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        loss = mx.array(0.0)
        gradients: list[mx.array] = []
        for part in parts(hidden.shape[0], chunk):
            now, weight = mx.depends(hidden[part], [loss, *gradients[-1:]]), mask[part]
            more, gradient = head_loss(head, now, targets[part], label_smoothing)
            loss = loss + mx.where(weight > 0, weight * more, 0).sum()
            gradients.append(mx.where(weight[:, None] != 0, weight[:, None] * gradient, 0).astype(hidden.dtype))
        return loss, mx.concatenate(gradients)

    @total.vjp
    def pull_back(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        _, targets, mask = primals
        gradient = outputs[1]
        return (cotangents[0] * gradient).astype(gradient.dtype), mx.zeros_like(targets), mx.zeros_like(mask)

    return total(hidden, targets, mask)[0]


def head_loss(
    head: Head, hidden: mx.array, targets: mx.array, label_smoothing: float = 0.0, gradient: bool = True
) -> tuple[mx.array, mx.array]:
    """`token_loss` (N,) of ``head(hidden)`` and its gradient (N, D) to each hidden state, both float32, from a part of
    the vocabulary at a time: so the head's weights are read once, and all logits never exist.

    As in FlashAttention (Dao et al., 2022, arXiv:2205.14135), what is summed so far, in the normalizer and in the
    gradient, shrinks where a part has a higher logit than all before. The target is left out of these sums: of a
    gradient p - 1 that is nearly 0, rounding p would leave little.

    Args:
        hidden: (N, D).
        targets: (N,) token ids.
        gradient: whether it is wanted; else it is no result.
    """
    targets = targets[:, None]
    highest = mx.full(targets.shape, LOWEST)
    others, wanted, level = mx.zeros(targets.shape), mx.zeros(targets.shape), mx.zeros(targets.shape)
    by_others, by_level = mx.zeros(hidden.shape), mx.zeros(hidden.shape)
    width = part_size(hidden.shape[0])
    for first in range(0, head.vocabulary, width):
        tokens = slice(first, min(first + width, head.vocabulary))
        part, size, place = head.part(tokens), tokens.stop - first, targets - first
        done = [others, wanted, level]  # else logits stay for what is taken of them later
        now = mx.depends(hidden, [*done, by_others, by_level] if gradient else done)
        projected = part.project(now)
        logits = part.finish(projected).astype(mx.float32)
        within = mx.clip(place, 0, size - 1)
        here = place == within
        wanted = mx.where(here, mx.take_along_axis(logits, within, axis=-1), wanted)
        before, highest = highest, mx.maximum(highest, _max(logits))
        powers = exp(logits - highest)
        kept = mx.where(here, 0, mx.take_along_axis(powers, within, axis=-1))
        powers = mx.put_along_axis(powers, within, kept, axis=-1)
        shrink = mx.contiguous(exp(before - highest))  # or mx.compile would take it again for every element below
        others = shrink * others + _sum(powers)[:, None]
        by_others = shrink * by_others + part.by_hidden(now, projected, powers)
        if label_smoothing > 0:
            level = level + _sum(logits)[:, None] / head.vocabulary
            by_level = by_level + part.by_hidden(now, projected, mx.full(logits.shape, 1 / head.vocabulary))
    total = others + exp(wanted - highest)
    loss = mx.log(total) + (highest - wanted) + label_smoothing * (wanted - level)
    _, [by_wanted] = mx.vjp(
        lambda hidden: head.of_each(hidden, targets.squeeze(-1)),
        [hidden],
        [(label_smoothing - others / total).squeeze(-1).astype(hidden.dtype)],
    )
    return loss.squeeze(-1), by_others / total + by_wanted - label_smoothing * by_level


def part_size(positions: int) -> int:
    """Tokens of the vocabulary whose logits are computed at a time: 2 MiB of logits in float32, and at least 4,096."""
    return max(4096, 2**19 // max(1, positions))


def _max(values: mx.array) -> mx.array:
    """Over the last axis, which is kept. MLX compares a row on a CPU one by one, but rows with each other at once."""
    if values.shape[-1] % 64 == 0:
        values = mx.unflatten(values, -1, (64, -1)).max(axis=-2)
    return values.max(axis=-1, keepdims=True)


def parts(number: int, chunk: int) -> list[slice]:
    """`number` positions in as few parts of at most `chunk` as there can be, all of about one size."""
    parts = max(1, -(-number // chunk))
    edges = [number * part // parts for part in range(parts + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def arrays(batch: Batch) -> Arrays:
    """What a compiled step takes of a batch: ``inputs`` (B, T), ``targets`` and ``mask`` (N,), and where the batch has
    them ``positions`` (N,), ``segments`` (B, T), the ``window`` (a number) and ``kept`` (B, T, D)."""
    targets, mask = batch.targets.reshape(-1), batch.mask.reshape(-1)
    found: Arrays = {"inputs": mx.array(batch.inputs)}
    if batch.positions is not None:
        found["positions"] = mx.array(batch.positions)
        targets, mask = targets[batch.positions], mask[batch.positions]
    if batch.segments is not None:
        found |= {"segments": mx.array(batch.segments), "window": batch.window}
    if batch.kept is not None:
        found["kept"] = mx.array(batch.kept)
    return found | {"targets": mx.array(targets), "mask": mx.array(mask)}


def batch_loss(output: Output, batch: Arrays, label_smoothing: float = 0.0, chunk: int | None = None) -> mx.array:
    """The summed loss of a batch, differentiable in the adapter. `chunk`: see `head_loss_sum`; None: `POSITIONS`.

    A head that is trained itself, or not known, gets its gradient from all logits of the batch at once.
    """
    hidden, head = _hidden(output, batch), output.head
    if output.at_once or not isinstance(head, Head):
        return loss_sum(head(hidden), batch["targets"], batch["mask"], label_smoothing)
    chunk = chunk or POSITIONS
    return head_loss_sum(head, hidden, batch["targets"], batch["mask"], label_smoothing, chunk=chunk)


def batch_score(output: Output, batch: Arrays) -> mx.array:
    """The summed loss of a batch, without smoothing and without anything for a gradient."""
    hidden, head, loss = _hidden(output, batch), output.head, mx.array(0.0)
    for part in parts(hidden.shape[0], POSITIONS if isinstance(head, Head) else POSITIONS // 16):
        now, targets, mask = mx.depends(hidden[part], [loss]), batch["targets"][part], batch["mask"][part]
        if isinstance(head, Head):
            losses = head_loss(head, now, targets, gradient=False)[0]
            loss = loss + mx.where(mask > 0, mask * losses, 0).sum()
        else:
            loss = loss + loss_sum(head(now), targets, mask)
    return loss


def _hidden(output: Output, batch: Arrays) -> mx.array:
    """Hidden states (N, D) at the positions of a batch."""
    hidden = output.hidden(batch["inputs"])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden[batch["positions"]] if "positions" in batch else hidden
