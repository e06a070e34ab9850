"""python -m mlx_lora.plan my.yaml: does it fit? From config.json alone, before any weight is downloaded."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_lora import config_file, data, hub, lora, memory, model, planning, prefix
from mlx_lora.batches import Batch, train_batches, valid_batches
from mlx_lora.config import PLANNED, Config, Quantize, Train
from mlx_lora.data import Example, Row, sizes
from mlx_lora.errors import InputError, exit_code
from mlx_lora.footprint import Footprint, Shapes, footprint, shapes
from mlx_lora.loop import total_steps
from mlx_lora.planning import with_options

SIZES = (8, 16, 24, 32, 64, 128)  # GB of memory that machines have
CHARACTERS = 3  # in a token, where there is no tokenizer to ask; in English there are four or more
SHORTEST = 64  # tokens of a row: shorter ones are no change to suggest
LONGEST = 2**20  # tokens of an assumed row, where the model's config names no longest
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Fit:
    """Into how many bytes a run is to fit, what makes it fit, and the bytes it then takes: nothing needed (""; but for
    what `train.plan: auto` does by itself), a change, or nothing (None)."""

    usable: int
    change: str | None
    peak: int | None


@dataclass(frozen=True)
class Probe:
    """Of two real updates of the largest batch: seconds of the second one and of an epoch (None where the rows were
    assumed), the most bytes held, and whether the weights were random."""

    seconds: float
    epoch_seconds: float | None
    peak: int
    random_weights: bool


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows to be scored on, as far as their lengths go, and what had to be assumed of them."""

    train: Sequence[Example]
    valid: Sequence[Example]
    assumed: str | None


def usable(size: int) -> int:
    """The bytes that a run may take of a machine's `size` GB: of what macOS lets its GPU have by itself (two thirds,
    three quarters from 36 GB on) nine tenths, the rest being for freed buffers."""
    return int(0.9 * size * 2**30 * (2 / 3 if size < 36 else 3 / 4))


def read_rows(config: Config, folder: Path, context: int | None) -> Rows:
    """The rows of a run; where they are not here, the longest that there may be, up to the model's `context`. Raises
    InputError for rows of a wrong form."""
    options, longest = config.data, min(config.data.max_seq_length, context or LONGEST)
    whole = Example(np.zeros(longest, np.int32), np.ones(longest, np.bool_), "")
    paths = [*options.train_paths, *options.valid_paths]
    for path in paths:
        if not Path(path).exists():  # of the hub, or not written yet
            rows = [whole] * config.train.batch_size * config.train.gradient_accumulation_steps
            why = "data.max_seq_length" if longest == options.max_seq_length else "the model's context"
            said = f"every row has {longest} tokens ({why}), since {path} is not on this machine"
            return Rows(rows, [] if options.valid == 0 else rows, said)
    data.check(options, paths)
    if any((folder / name).exists() for name in TOKENIZERS):
        tokenized, held_out = data.load(options, model.load_tokenizer(folder, None, config.model))
        return Rows(tokenized.examples, held_out.examples if held_out else [], None)

    def guessed(paths: list[str]) -> list[Example]:
        rows = (row for path in paths for row in data.entries(path, longest) if isinstance(row, Row))
        lengths = [max(2, -(-_characters(row) // CHARACTERS)) for row in rows]
        if options.on_overflow == "drop":
            lengths = [length for length in lengths if length <= longest] or [longest]
        return [
            replace(whole, tokens=whole.tokens[:length], supervised=whole.supervised[:length]) for length in lengths
        ]

    train = guessed(options.train_paths)
    valid = train if options.valid else []
    if isinstance(options.valid, str):
        valid = guessed(options.valid_paths)
    said = f"a token has {CHARACTERS} characters, and all are learned, since the tokenizer is not on this machine"
    return Rows(train, valid, said)


def _characters(row: Row) -> int:
    """All text of a row."""
    waiting: list[Any] = [row.content]
    total = 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
    return total


def adapted(config: Config, folder: Path, on_cpu: bool) -> nn.Module:
    """The model with its adapter: shapes and types only."""
    base = model.structure(config.model, folder, on_cpu)
    try:
        lora.attach(base, config.lora, config.train.seed)
    except (ValueError, OverflowError) as error:
        raise InputError(f"model: {folder / 'config.json'}: no array can be as large as it says ({error})") from None
    return base


def need(found: Shapes, config: Config, batch: Batch, valid: Sequence[Example], kept: int = 0) -> Footprint:
    """Of a run whose largest batch is `batch`, that is scored on the rows `valid`, and keeps `kept` bytes of its frozen
    blocks in memory."""
    scored = valid_batches(config, valid).largest() if len(valid) else None
    return footprint(found, config.train, batch, scored, kept)


def kept_prefix(found: Shapes, config: Config, rows: Sequence[Example]) -> int:
    """The bytes of memory that `train.prefix_cache` takes here, of a model that it can be used with."""
    batches = train_batches(config, rows)
    size = int(sizes(rows)[0].sum()) * found.hidden * found.size
    against = "the first block is adapted" if 0 in found.blocks else None
    epochs = total_steps(config, batches) / batches.steps_per_epoch
    limit = config.train.prefix_cache_limit * 1e9
    where, _ = prefix.choose(config.train.prefix_cache, against, epochs, size, limit, memory.available() / 10)
    return size if where == "memory" else 0


def ways(
    config: Config, folder: Path, base: nn.Module, rows: Rows, on_cpu: bool, own: Footprint
) -> Iterator[tuple[str, int]]:
    """Changes of a config, the smallest first, as `--set` takes them, each with the bytes that its run takes: none
    (`own`); what changes no result; 4 bits for the base; then shorter rows, halved again and again."""
    found = shapes(base)
    words: list[str] = []

    def with_or_without_cache(
        words: list[str], config: Config, batch: Batch, valid: Sequence[Example]
    ) -> Iterator[tuple[str, int]]:
        peak = need(found, config, batch, valid, own.prefix).peak
        yield ", ".join(words), peak
        if own.prefix:
            yield ", ".join(["train.prefix_cache=disk", *words]), peak - own.prefix

    yield "", own.peak
    plain = with_options(config, **{name: Train.model_fields[name].default for name in PLANNED})
    if own.prefix:
        yield "train.prefix_cache=disk", own.peak - own.prefix
    for quantize in (False, True):
        if quantize:
            if config.model.quantize is not None or any("scales" in module for module in base.modules()):
                break
            smaller = config.model.model_copy(update={"quantize": Quantize()})
            base = adapted(config.model_copy(update={"model": smaller}), folder, on_cpu)
            found, words = shapes(base), ["model.quantize={bits: 4}"]
        for options, batch in planning.candidates(plain, base, rows.train):
            changed = config.model_copy(update={"train": options})
            yield from with_or_without_cache([*words, *_differences(config, options)], changed, batch, rows.valid)
    least = with_options(config, batch_tokens=1, loss_chunk=16, gradient_checkpointing=True)
    length = (max(int(sizes(part)[0].max()) for part in (rows.train, rows.valid) if len(part)) + 1) // 2
    while length >= SHORTEST:
        batch = train_batches(least, planning.cut_rows(rows.train, length)).largest()
        cut = [*words, f"data.max_seq_length={length}", *_differences(config, least.train)]
        yield from with_or_without_cache(cut, least, batch, planning.cut_rows(rows.valid, length))
        length //= 2


def _differences(config: Config, options: Train) -> list[str]:
    if config.train.plan == "auto":  # then the run chooses them itself
        return []
    names = [name for name in PLANNED if getattr(options, name) != getattr(config.train, name)]
    return [f"train.{name}={json.dumps(getattr(options, name)).strip(chr(34))}" for name in names]


def probe(config: Config, folder: Path, base: nn.Module, rows: Rows) -> Probe:
    """Runs two updates of the largest batch, with the model's weights where they are in `folder`, else random ones."""
    random = not any(folder.glob("model*.safetensors"))
    if not random:
        base = model.load(config.model, evaluated=False).model
        lora.attach(base, config.lora, config.train.seed)
    model.evaluate(base)
    batches = train_batches(config, rows.train)
    batch = batches.largest()
    with memory.limits(memory.available()):
        seconds = planning.measured(config.train, base, batch, model.can_compile()).seconds
    tokens = int(sizes(rows.train)[0].sum()) / batches.padding_efficiency
    epoch = None if rows.assumed else seconds * tokens / batch.mask.size
    return Probe(seconds, epoch, mx.get_peak_memory(), random_weights=random)


def _main() -> None:
    options = _parser().parse_args()
    config = config_file.load(options.config, options.set)
    on_cpu = mx.default_device() == mx.cpu if options.device is None else options.device == "cpu"
    local = model.is_local(config.model.path)
    folder = model.resolve(config.model, weights=False) if local else hub.fetch_config(config.model)
    base = adapted(config, folder, on_cpu)
    rows = read_rows(config, folder, getattr(base.args, "max_position_embeddings", None))
    batch = train_batches(config, rows.train).largest()
    found = shapes(base)
    own = need(found, config, batch, rows.valid, kept_prefix(found, config, rows.train))
    changes = list(ways(config, folder, base, rows, on_cpu, own))

    def fit(limit: int) -> Fit:
        return Fit(limit, *next(((change, peak) for change, peak in changes if peak <= limit), (None, None)))

    limit = config.train.memory_limit
    room = int(0.9 * memory.available())  # a tenth is for freed buffers
    here = fit(room if limit is None else min(room, int(limit * 1e9)))
    fits = {size: fit(usable(size)) for size in SIZES}
    probed = None
    if options.probe:
        if own.peak > here.usable:
            raise InputError(f"--probe: the run does not fit into the {here.usable / 1e9:.2f} GB of this machine")
        probed = probe(config, folder, base, rows)
    facts = {
        "model": config.model.path,
        "base": model.describe(model.structure(config.model, folder, on_cpu)),
        "rows": len(rows.train),
        "assumed": rows.assumed,
        "largest_batch": list(batch.mask.shape),
        "device": "cpu" if on_cpu else "gpu",
        "compiled": model.can_compile(),
        "bytes": asdict(own) | {"peak": own.peak},
        "this_machine": asdict(here),
        "machines": [{"gigabytes": size} | asdict(fit) for size, fit in fits.items()],
        "probe": asdict(probed) if probed else None,
    }
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(config, facts, own, here, fits, probed)
    if here.change != "":
        sys.exit(1)


def _print(
    config: Config, facts: dict[str, Any], need: Footprint, here: Fit, fits: dict[int, Fit], found: Probe | None
) -> None:
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False)

    lines, width = facts["largest_batch"]
    say(f"model: {config.model.path}; base {facts['base']}")
    say(f"{facts['rows']} rows to train on; the largest batch has {lines} x {width} tokens")
    if facts["assumed"]:
        say(f"assumed: {facts['assumed']}")
    say("")
    console.print(_parts(config, need))
    say("")
    say(_verdict("this machine", here, need.peak))
    say("")
    console.print(_machines(fits, need.peak))
    say("")
    if config.train.plan == "auto":
        say("train.plan: auto computes what does not fit as it stands in smaller parts, and recomputes more.")
    say("A run can use nine tenths of what macOS lets a GPU have of a machine's memory.")
    if facts["device"] == "cpu":
        say("Counted for a CPU, where model.dtype: auto is float32. For a Mac's GPU: --device gpu.")
    else:
        say("Counted for a GPU as for a CPU, but in its types. Never measured on a GPU.")
    if not facts["compiled"]:
        say("There is no C++ compiler here, so steps run uncompiled, and take more memory than this.")
    if found:
        weights = "random weights of this shape" if found.random_weights else "the model's weights"
        say("")
        say(
            f"probe: the largest batch, computed with {weights}, took {found.seconds:.2f} s and {found.peak / 1e9:.2f} "
            f"GB{'' if found.epoch_seconds is None else f'; so an epoch takes about {_time(found.epoch_seconds)}'}"
        )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _parts(config: Config, need: Footprint) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("what is in memory")
    table.add_column("GB", justify="right")
    always = {
        "weights": need.weights,
        "adapter: now, an update ago" + ", and the best" * (need.evaluation > 0): need.adapter,
        f"optimizer ({config.train.optimizer.name})": need.optimizer,
        "prefix cache (train.prefix_cache)": need.prefix,
        "activations kept for the backward pass": need.kept,
    }
    for name, part in always.items():
        if part or name != "prefix cache (train.prefix_cache)":
            table.add_row(name, f"{part / 1e9:.2f}")
    table.add_section()
    table.add_row("and one at a time", "")
    table.add_row("  activations of the block that is computed", f"{need.backward / 1e9:.2f}")
    table.add_row("  logits, a part of them at a time", f"{need.logits / 1e9:.2f}")
    table.add_row("  without activations: the update of the adapter", f"{need.update / 1e9:.2f}")
    if need.evaluation:
        table.add_row("  without activations: an evaluation", f"{need.evaluation / 1e9:.2f}")
    table.add_section()
    table.add_row("peak", f"{need.peak / 1e9:.2f}")
    return table


def _machines(fits: dict[int, Fit], whole: int) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("machine", justify="right", no_wrap=True)
    table.add_column("can be used", justify="right", no_wrap=True)
    table.add_column("")
    for size, fit in fits.items():
        table.add_row(f"{size} GB", f"{fit.usable / 1e9:.1f} GB", _answer(fit, whole))
    return table


def _verdict(name: str, fit: Fit, whole: int) -> str:
    return f"{name}, where {fit.usable / 1e9:.1f} GB can be used: {_answer(fit, whole)}"


def _answer(fit: Fit, whole: int) -> str:
    """`whole`: the bytes that the run takes as it stands."""
    if fit.change is None or fit.peak is None:
        return "does not fit: adapt fewer lora.layers, or choose a smaller model"
    if fit.change:
        return f"fits with {fit.change}"
    return "fits" if fit.peak == whole else f"fits in {fit.peak / 1e9:.1f} GB, by train.plan: auto"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora plan",
        description="Say whether a run fits in memory, from the model's config.json alone, before any download.",
        epilog="Exit code: 0 it fits this machine, 1 it does not, 2 bad input.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of options")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override an option")
    parser.add_argument(
        "--device", choices=["cpu", "gpu"], help="where it is to run: by it model.dtype auto is chosen; default: here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes and seconds")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="time two real updates, with the weights where they are here, else with random ones of their shape",
    )
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
