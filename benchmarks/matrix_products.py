"""The matrix products that a training step cannot do without: counted, and ready to be run alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx_lora  # noqa: F401  (loads OpenBLAS on Linux before MLX is imported)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import lora
from mlx_lora.batches import Batch
from mlx_lora.head import Head
from mlx_lora.loss import POSITIONS, part_size, parts

# The order in which a block applies its layers; attention lies between v_proj and o_proj.
STAGES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}


@dataclass(frozen=True)
class Product:
    """A matrix product that can be queued, and its floating-point operations."""

    queue: Callable[[], mx.array]
    operations: int
    forward: bool  # of the base: what prefill needs too


@dataclass
class Products:
    """Products in groups that are evaluated together; random inputs of one shape share an array."""

    dtype: mx.Dtype
    groups: list[list[Product]] = field(default_factory=list)
    _inputs: dict[tuple[int, ...], mx.array] = field(default_factory=dict)

    def add(self, left: tuple[int, ...], right: tuple[int, ...] | mx.array, *, forward: bool = False) -> None:
        """A product of random matrices (..., m, k) and (..., k, n), or with a given right one."""
        a = self._input(left)
        b = right if isinstance(right, mx.array) else self._input(right)
        self._append(lambda: a @ b, left, b.shape[-1], forward)

    def add_layer(self, layer: nn.Module, rows: int, *, forward: bool) -> None:
        """A linear layer or a tied embedding on (rows, in), or backward from (rows, out) to (rows, in)."""
        outputs, inputs = lora.weight_shape(layer)
        left, n = ((rows, inputs), outputs) if forward else ((rows, outputs), inputs)
        if "scales" not in layer:
            self.add(left, layer.weight.T if forward else layer.weight, forward=forward)
            return
        a = self._input(left)
        packed = layer.weight, layer.scales, layer.get("biases"), forward, layer.group_size, layer.bits
        self._append(lambda: mx.quantized_matmul(a, *packed, mode=layer.mode), left, n, forward)

    def new_group(self) -> None:
        self.groups.append([])

    def operations(self, forward_only: bool = False) -> int:
        chosen = (product for group in self.groups for product in group if product.forward or not forward_only)
        return sum(product.operations for product in chosen)

    def inputs(self) -> list[mx.array]:
        return list(self._inputs.values())

    def run(self) -> None:
        for group in self.groups:
            mx.eval([product.queue() for product in group])

    def _append(self, queue: Callable[[], mx.array], left: tuple[int, ...], n: int, forward: bool) -> None:
        operations = 2 * n
        for size in left:
            operations *= size
        self.groups[-1].append(Product(queue, operations, forward))

    def _input(self, shape: tuple[int, ...]) -> mx.array:
        if shape not in self._inputs:
            self._inputs[shape] = mx.random.normal(shape).astype(self.dtype)
        return self._inputs[shape]


def products(network: nn.Module, rows: int, tokens: int, at_head: int) -> Products:
    """What a step needs on (rows, tokens) inputs with `at_head` positions at the head, nothing evaluated. The model is
    a Llama, Qwen2 or Qwen3 with adapters in its blocks."""
    made = Products(network.model.norm.weight.dtype)
    lowest = min(number for path in lora.layers(network) if (number := lora.block_number(path)) is not None)
    for block in network.layers:
        made.new_group()
        _forward(made, block, rows, tokens)
    head = Head(network.lm_head if "lm_head" in network else network.model.embed_tokens, lambda logits: logits)
    for part in parts(at_head, POSITIONS):
        positions = part.stop - part.start
        width = part_size(positions)
        for token in range(0, head.vocabulary, width):
            made.new_group()
            layer = head.part(slice(token, token + width)).layer
            made.add_layer(layer, positions, forward=True)
            made.add_layer(layer, positions, forward=False)
    for number in range(len(network.layers) - 1, lowest - 1, -1):
        made.new_group()
        _backward(made, network.layers[number], rows, tokens, lowest=number == lowest)
    return made


def _linears(block: nn.Module) -> dict[str, Any]:
    return {name: getattr(block.mlp if STAGES[name] > 2 else block.self_attn, name) for name in STAGES}


def _forward(made: Products, block: nn.Module, rows: int, tokens: int) -> None:
    for layer in _linears(block).values():
        if not isinstance(layer, lora.LoRALayer):
            made.add_layer(layer, rows * tokens, forward=True)
            continue
        outputs, inputs = lora.weight_shape(layer.base)
        made.add_layer(layer.base, rows * tokens, forward=True)
        made.add((rows * tokens, inputs), (inputs, layer.rank))
        made.add((rows * tokens, layer.rank), (layer.rank, outputs))
    heads, half, size = _attention(block, tokens)
    made.add((rows, heads, half, size), (rows, heads, size, tokens), forward=True)  # scores
    made.add((rows, heads, half, tokens), (rows, heads, tokens, size), forward=True)  # times values


def _backward(made: Products, block: nn.Module, rows: int, tokens: int, lowest: bool) -> None:
    linears = _linears(block)
    adapted = {name for name, layer in linears.items() if isinstance(layer, lora.LoRALayer)}
    first = min(STAGES[name] for name in adapted) if lowest else -1  # nothing before it needs a gradient
    for name, layer in linears.items():
        to_input = STAGES[name] > first
        base = layer.base if name in adapted else layer
        outputs, inputs = lora.weight_shape(base)
        if to_input:
            made.add_layer(base, rows * tokens, forward=False)
        if name in adapted:
            rank = layer.rank
            made.add((rows * tokens, outputs), (outputs, rank))
            made.add((rank, rows * tokens), (rows * tokens, outputs))  # lora_b's gradient
            made.add((inputs, rows * tokens), (rows * tokens, rank))  # lora_a's
            if to_input:
                made.add((rows * tokens, rank), (rank, inputs))
    heads, half, size = _attention(block, tokens)
    wanted = adapted if lowest else {"q_proj", "k_proj", "v_proj"}
    if "v_proj" in wanted:
        made.add((rows, heads, tokens, half), (rows, heads, half, size))
    if wanted & {"q_proj", "k_proj"}:
        made.add((rows, heads, half, size), (rows, heads, size, tokens))  # the probabilities' gradient
    if "q_proj" in wanted:
        made.add((rows, heads, half, tokens), (rows, heads, tokens, size))
    if "k_proj" in wanted:
        made.add((rows, heads, tokens, half), (rows, heads, half, size))


def _attention(block: nn.Module, tokens: int) -> tuple[int, int, int]:
    """Heads, half the queries, and the size of a head."""
    attention = block.self_attn
    query = attention.q_proj.base if isinstance(attention.q_proj, lora.LoRALayer) else attention.q_proj
    return attention.n_heads, (tokens + 1) // 2, lora.weight_shape(query)[0] // attention.n_heads


def of_batch(network: nn.Module, batch: Batch) -> Products:
    """The products of a batch that is not packed."""
    assert batch.segments is None
    rows, tokens = batch.inputs.shape
    return products(network, rows, tokens, rows * tokens if batch.positions is None else len(batch.positions))
