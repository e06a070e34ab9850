"""Token cross-entropy in float32, and its sum over a batch."""

import mlx.core as mx

from mlx_lora.batches import Batch
from mlx_lora.head import Logits

Arrays = tuple[mx.array, mx.array, mx.array, mx.array | None]


def token_loss(logits: mx.array, targets: mx.array, label_smoothing: float = 0.0) -> mx.array:
    """Cross-entropy of each position, float32.

    With smoothing a the target is (1 - a) · one-hot + a / K over the K tokens of the vocabulary (Szegedy et al.,
    2015, arXiv:1512.00567).

    Args:
        logits: (..., K), of any floating type; the reduction is in float32.
        targets: (...) token ids.
        label_smoothing: a, in [0, 1).
    """
    logits = logits.astype(mx.float32)
    normalizer = _logsumexp(logits)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    loss = normalizer - chosen
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * (normalizer - logits.mean(axis=-1))
    return loss


def _logsumexp(logits: mx.array) -> mx.array:
    """Over the last axis, summed in two stages: on a CPU, MLX adds a row up term by term in float32 (`mx.logsumexp`
    too), which is off by 1e-5 at 50,000 terms and more than that beyond."""
    highest = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    vocabulary = logits.shape[-1]
    part = max(size for size in range(1, 513) if vocabulary % size == 0)
    sums = mx.unflatten(mx.exp(logits - highest), -1, (-1, part)).sum(axis=-1)
    return highest.squeeze(-1) + mx.log(sums.sum(axis=-1))


def loss_sum(logits: mx.array, targets: mx.array, mask: mx.array, label_smoothing: float = 0.0) -> mx.array:
    """The sum of the token losses where `mask` is 1; 0 where nothing is supervised.

    Whoever calls it divides once by the supervised tokens of the whole update, so that the result does not depend on
    how rows are padded or split into micro-batches.
    """
    return mx.where(mask > 0, token_loss(logits, targets, label_smoothing), 0).sum()


def arrays(batch: Batch) -> Arrays:
    """A batch as MLX arrays: inputs, targets, mask, positions."""
    positions = None if batch.positions is None else mx.array(batch.positions)
    return mx.array(batch.inputs), mx.array(batch.targets), mx.array(batch.mask), positions


def batch_loss(logits: Logits, batch: Arrays, label_smoothing: float = 0.0) -> mx.array:
    """The summed loss of a batch; logits are computed only at its positions."""
    inputs, targets, mask, positions = batch
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    if positions is not None:
        targets, mask = targets[positions], mask[positions]
    return loss_sum(logits(inputs, positions), targets, mask, label_smoothing)
