"""Token cross-entropy in float32, and its sum over a batch, formed in chunks of positions."""

from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_lora.batches import Batch
from mlx_lora.exponential import exp
from mlx_lora.head import Function, Output

Arrays = dict[str, Any]


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
    head: Function,
    hidden: mx.array,
    targets: mx.array,
    mask: mx.array,
    label_smoothing: float = 0.0,
    *,
    chunk: int,
) -> mx.array:
    """`loss_sum` of ``head(hidden)`` with the logits of only `chunk` positions in memory at a time.

    The gradient to `hidden` is formed chunk by chunk in the forward pass, where the logits are at hand (as in Liger
    kernels, arXiv:2410.10989): no logits are kept for the backward pass or computed again in it. There is none to the
    head's own parameters, so the head has to be frozen. Chunks are ordered by `mx.depends`: else MLX may start on all
    of them at once.

    Args:
        head: (n, D) → logits (n, K), one position at a time.
        hidden: (N, D).
        targets: (N,) token ids.
        mask: (N,), how much each target counts. What is common to all is better here than in a factor of the result:
            in bfloat16, a gradient that is scaled afterwards is rounded twice.
        chunk: positions, at least 1.
    """
    value_and_gradient = mx.value_and_grad(partial(_part_loss, head=head, label_smoothing=label_smoothing))

    @mx.custom_function
    def total(hidden: mx.array, targets: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        loss = mx.array(0.0)
        gradients: list[mx.array] = []
        for part in _parts(hidden.shape[0], chunk):
            now = mx.depends(hidden[part], [loss, *gradients[-1:]])
            more, gradient = value_and_gradient(now, targets[part], mask[part])
            loss = loss + more
            gradients.append(gradient)
        return loss, mx.concatenate(gradients)

    @total.vjp
    def pull_back(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        _, targets, mask = primals
        gradient = outputs[1]
        return (cotangents[0] * gradient).astype(gradient.dtype), mx.zeros_like(targets), mx.zeros_like(mask)

    return total(hidden, targets, mask)[0]


def _part_loss(hidden: mx.array, targets: mx.array, mask: mx.array, head: Function, label_smoothing: float) -> mx.array:
    return loss_sum(head(hidden), targets, mask, label_smoothing)


def _parts(number: int, chunk: int) -> list[slice]:
    """`number` positions in as few parts of at most `chunk` as there can be, all of about one size."""
    parts = max(1, -(-number // chunk))
    edges = [number * part // parts for part in range(parts + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def chunk_size(vocabulary: int) -> int:
    """Positions whose float32 logits take about 8 MiB, and at least 48: with fewer, reading the head's weights again
    for every chunk takes longer than multiplying them. On a GPU, which multiplies faster than it reads, 64 MiB and
    256."""
    least, size = (48, 8 * 2**20) if mx.default_device() == mx.cpu else (256, 64 * 2**20)
    return max(least, size // (4 * vocabulary))


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
    """The summed loss of a batch, differentiable in the adapter. `chunk`: see `head_loss_sum`; None: `chunk_size`.

    A head that is trained itself gets its gradient from all logits of the batch at once.
    """
    hidden = _hidden(output, batch)
    if output.adapted:
        return loss_sum(output.head(hidden), batch["targets"], batch["mask"], label_smoothing)
    chunk = chunk or chunk_size(output.vocabulary)
    return head_loss_sum(output.head, hidden, batch["targets"], batch["mask"], label_smoothing, chunk=chunk)


def batch_score(output: Output, batch: Arrays) -> mx.array:
    """The summed loss of a batch, without smoothing and without anything for a gradient."""
    hidden, loss = _hidden(output, batch), mx.array(0.0)
    for part in _parts(hidden.shape[0], chunk_size(output.vocabulary)):
        logits = output.head(mx.depends(hidden[part], [loss]))
        loss = loss + loss_sum(logits, batch["targets"][part], batch["mask"][part])
    return loss


def _hidden(output: Output, batch: Arrays) -> mx.array:
    """Hidden states (N, D) at the positions of a batch."""
    hidden = output.hidden(batch["inputs"])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden[batch["positions"]] if "positions" in batch else hidden
