"""The memory that a run takes, from shapes alone: no weight has to exist, and nothing is computed.

Activations are counted in columns: one number for each token. What a block keeps for its backward pass follows from
what our layers and `remember` keep, and from the widths of its layers: D of the hidden states, A of the queries, K of
the keys and of the values, I of gate and of up. What is there for a moment besides, while a block is in its backward
pass, is up to MLX's compiler, which fuses and orders operations: `_AT_WORK` has whole numbers of arrays, found by
changing one width at a time, compiled and on a CPU. Uncompiled there are more of them.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import lora
from mlx_lora.batches import Batch
from mlx_lora.config import Train
from mlx_lora.errors import InputError
from mlx_lora.gradient_checkpointing import MLP_NAMES, Level
from mlx_lora.head import LAYERS
from mlx_lora.lora import LoRALayer
from mlx_lora.loss import POSITIONS, part_size, parts
from mlx_lora.optim import initial_state, make_optimizer

# Arrays of I, D, A and K columns that a block's backward pass holds besides what is kept, where its MLP is adapted, and
# where it is not: SwiGLU's result, its gradient, the sigmoid, the gradients to gate and up and so on, and what runs
# again. One of I is the next result, which MLX allocates before it frees what the last one was made of.
_AT_WORK: dict[Level, tuple[tuple[int, ...], tuple[int, ...]]] = {
    True: ((9, 9, 8, 5), (8, 6, 5, 0)),
    "mlp": ((9, 5, 4, 1), (7, 3, 0, 0)),
    "selective": ((6, 13, 3, 1), (6, 7, 0, 0)),
    False: ((5, 1, 0, 0), (6, 4, 0, 0)),
}
# Arrays of I, D, A and K columns of a block's forward pass in an evaluation, which runs uncompiled: most are SwiGLU's.
_SCORED = (10, 4, 2, 2)
# Arrays of D columns that are there beside the logits: hidden states, gradients, what runs again early.
_BESIDE_LOGITS: dict[Level, int] = {True: 11, "mlp": 4, "selective": 4, False: 8}
_LOGITS = 6  # arrays of a part's logits, float32: projected, their powers, two on the way, and so on; one ahead


@dataclass(frozen=True)
class Footprint:
    """In bytes. `held` is there all the time, `kept` from the forward to the backward pass.

    ``weights``: the base. ``adapter``: as it is, as it was when it was last put into the model, and the best.
    ``optimizer``: its state. ``prefix``: what frozen blocks gave, where that is kept in memory. ``kept``: activations.
    ``backward``, ``logits``, ``update`` and ``evaluation``: what one block's backward pass, the loss, the optimizer,
    and the largest batch of an evaluation hold for a moment, never two of them at once.

    Loading takes less: the weights and the source of one layer, the largest ones first. So do the answers to
    `eval.samples`, a row each, of which keys and values alone are kept.
    """

    weights: int
    adapter: int
    optimizer: int
    prefix: int
    kept: int
    backward: int
    logits: int
    update: int
    evaluation: int

    @property
    def held(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.prefix

    @property
    def peak(self) -> int:
        return self.held + max(self.kept + max(self.backward, self.logits), self.update, self.evaluation)


@dataclass(frozen=True)
class _Layer:
    """A linear layer of a block: its columns, rank (0: not adapted), and whether it is in the MLP, and leads back to
    the residual stream. A layer of experts counts the columns of all experts that a token meets."""

    inputs: int
    outputs: int
    rank: int
    in_mlp: bool
    back: bool


@dataclass(frozen=True)
class _Block:
    """A block's layers and widths."""

    layers: tuple[_Layer, ...]
    hidden: int
    queries: int
    keys: int
    inner: int
    normed: bool  # queries and keys are normalized, as in Qwen3
    dropout: bool


@dataclass(frozen=True)
class Shapes:
    """What of a model with its adapter attached a footprint depends on. Its arrays may be unevaluated, and stay so.

    ``blocks`` are those that have a backward pass, by number. ``size``: bytes of an activation. ``head_at_once``: all
    logits are computed at once.
    """

    weights: int
    adapter: dict[str, mx.array]
    blocks: dict[int, _Block]
    hidden: int
    size: int
    vocabulary: int
    head_at_once: bool


def shapes(model: nn.Module) -> Shapes:
    """Raises InputError where the model is not built as Llama's and Qwen's are."""
    hidden = getattr(model.args, "hidden_size", None)
    head = model.get("lm_head") or getattr(model.get("model"), "embed_tokens", None)
    if not isinstance(hidden, int) or head is None:
        raise InputError(
            f"{type(model).__module__}: its parts have names that are not known here, so they cannot be counted; set "
            "train.plan to auto, which tries instead"
        )
    first = _first_differentiated(model)
    adapted = isinstance(head, LoRALayer)
    return Shapes(
        weights=lora.count(model).base_bytes,
        adapter=lora.parameters(model),
        blocks={number: _block(block, hidden) for number, block in enumerate(model.layers) if number >= first},
        hidden=hidden,
        size=_activations_size(model),
        vocabulary=lora.weight_shape(head.base if adapted else head)[0],
        head_at_once=adapted or not isinstance(head, LAYERS),
    )


def footprint(shapes: Shapes, options: Train, batch: Batch, scored: Batch | None = None, prefix: int = 0) -> Footprint:
    """Of a run whose largest batch is `batch`, and the largest of its evaluations `scored`: without them it keeps no
    best adapter. `prefix`: bytes of the prefix cache."""
    trainable = sum(array.nbytes for array in shapes.adapter.values())
    state = initial_state(make_optimizer(options), shapes.adapter)
    optimizer = sum(array.nbytes for _, array in tree_flatten(state) if isinstance(array, mx.array))
    kept = at_work = 0.0
    for number, block in shapes.blocks.items():
        level = _level(options.gradient_checkpointing, number)
        kept += _kept(block, level, shapes.size)
        at_work = max(at_work, _at_work(block, level))
    earlier = trainable if options.gradient_accumulation_steps > 1 or options.batch_tokens else 0
    bytes_of_column = batch.mask.size * shapes.size
    return Footprint(
        weights=shapes.weights,
        adapter=(2 if scored is None else 3) * trainable,
        optimizer=optimizer,
        prefix=prefix,
        kept=int(bytes_of_column * kept) + earlier,
        backward=int(bytes_of_column * at_work),
        logits=_logits(shapes, options, batch),
        update=2 * trainable + optimizer,  # the gradient, the new adapter, the new state
        evaluation=0 if scored is None else _evaluation(shapes, scored),
    )


def _first_differentiated(model: nn.Module) -> int:
    """The number of the lowest block that has a backward pass: none below it keeps anything."""
    if any(lora.block_number(path) is None and not path.endswith("lm_head") for path in lora.layers(model)):
        return 0
    return min(
        (number for path in lora.layers(model) if (number := lora.block_number(path)) is not None),
        default=len(model.layers),
    )


def _level(level: Level, number: int) -> Level:
    """What `train.gradient_checkpointing` says of one block."""
    if isinstance(level, (bool, str)):
        return level
    return True if number % level == 0 else "selective"


def _activations_size(model: nn.Module) -> int:
    """Bytes of one number: of an embedding's rows, or of their scales where they are quantized."""
    for _, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            return int(module.get("scales", module.weight).dtype.size)
    return 4


def _block(block: nn.Module, hidden: int) -> _Block:
    adaptable = lora.adaptable(block)
    layers: list[_Layer] = []
    behind_attention = False
    for path, module in block.named_modules():  # what was made last comes first
        if path not in adaptable:
            continue
        base, rank = (module.base, module.rank) if isinstance(module, LoRALayer) else (module, 0)
        *experts, outputs, inputs = lora.weight_shape(base)
        part = path.split(".")[0]
        in_mlp = part in MLP_NAMES
        # queries may have as many columns as the hidden states
        back = outputs == hidden and (in_mlp or not behind_attention)
        behind_attention |= back and not in_mlp
        times = _experts_met(block[part]) if experts else 1
        layers.append(_Layer(times * inputs, times * outputs, times * rank, in_mlp, back))
    queries = sum(layer.inputs for layer in layers if layer.back and not layer.in_mlp)
    return _Block(
        tuple(layers),
        hidden,
        queries,
        keys=(sum(layer.outputs for layer in layers if not layer.back and not layer.in_mlp) - queries) // 2,
        inner=sum(layer.outputs for layer in layers if not layer.back and layer.in_mlp) // 2,
        normed=any(path.endswith("q_norm") for path, _ in block.named_modules()),
        dropout=any(isinstance(module, LoRALayer) and module.dropout > 0 for module in block.modules()),
    )


def _experts_met(mlp: nn.Module) -> int:
    return next((int(getattr(mlp, name)) for name in ("top_k", "num_experts_per_tok") if hasattr(mlp, name)), 1)


def _kept(block: _Block, level: Level, size: int) -> float:
    """Columns that a block keeps from its forward to its backward pass."""
    adapted = [layer for layer in block.layers if layer.rank]
    masks = sum(layer.inputs for layer in adapted) / size if block.dropout else 0.0  # a byte each
    if level is True:
        return block.hidden + masks
    remembered = [layer for layer in block.layers if level != "mlp" or not layer.in_mlp]
    ranks = sum(layer.rank for layer in remembered)
    if level is not False:
        # its input; what the products give, but the MLP's last, which the next block's input holds; the attention's
        results = sum(layer.outputs for layer in remembered if not (layer.in_mlp and layer.back))
        return block.hidden + results + block.queries + ranks + masks
    # the residual stream twice; queries, keys, values, gate, up; the attention's result; what adapted layers take
    given = sum(layer.outputs for layer in block.layers if not layer.back)
    normed = block.queries + block.keys if block.normed else 0
    if block.dropout:  # each layer has its own
        taken = sum(layer.inputs for layer in adapted)
    else:
        taken = sum({(layer.in_mlp, layer.back): layer.inputs for layer in adapted}.values())
    return 2 * block.hidden + given + normed + block.queries + taken + ranks + masks


def _at_work(block: _Block, level: Level) -> int:
    counts = _AT_WORK[level][0 if any(layer.rank for layer in block.layers if layer.in_mlp) else 1]
    return _columns(counts, block)


def _columns(counts: tuple[int, ...], block: _Block) -> int:
    """Of so many arrays of I, D, A and K columns."""
    widths = (block.inner, block.hidden, block.queries, block.keys)
    return sum(count * width for count, width in zip(counts, widths, strict=True))


def _logits(shapes: Shapes, options: Train, batch: Batch) -> int:
    """What the loss holds beside what is kept; see `head_loss`."""
    positions = batch.mask.size if batch.positions is None else batch.positions.size
    arrays = _LOGITS + (options.label_smoothing > 0)
    level = _level(options.gradient_checkpointing, 0)
    beside = batch.mask.size * shapes.size * shapes.hidden * _BESIDE_LOGITS[level]
    if shapes.head_at_once:
        return arrays * positions * shapes.vocabulary * 4 + beside
    together = max(part.stop - part.start for part in parts(positions, options.loss_chunk or POSITIONS))
    return arrays * together * min(shapes.vocabulary, part_size(together)) * 4 + beside


def _evaluation(shapes: Shapes, batch: Batch) -> int:
    """What the largest batch of an evaluation holds; see `batch_score`."""
    at_work = max((_columns(_SCORED, block) for block in shapes.blocks.values()), default=0)
    positions = min(POSITIONS, batch.mask.size)
    logits = _LOGITS * positions * min(shapes.vocabulary, part_size(positions)) * 4
    return max(batch.mask.size * shapes.size * at_work, logits)
