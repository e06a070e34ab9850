"""python -m mlx_lora.train --config my.yaml: fine-tune a model."""

import argparse
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_lora import (
    __version__,
    adapter_files,
    chat,
    checkpoint,
    config_file,
    data,
    files,
    lora,
    memory,
    metrics,
    model,
    page,
    planning,
    prefix,
    trackers,
)
from mlx_lora.adapter_files import mlx_form
from mlx_lora.batches import ORDER, train_batches
from mlx_lora.config import PLANNED, Config
from mlx_lora.data import Dataset
from mlx_lora.errors import InputError, exit_code
from mlx_lora.loop import Result, Run, total_steps
from mlx_lora.model import Base
from mlx_lora.optim import learning_rate, warmup_steps
from mlx_lora.supervisor import before, supervise

T = TypeVar("T")


def finetune(
    config: str | Path | dict[str, Any] | Config, overrides: list[str] | None = None, resume: bool = False
) -> Result:
    """Trains as the command does: `config` is a YAML file, a mapping or a Config, `overrides` are ``a.b=value``.

    Returns losses, steps, epochs, tokens and seconds. Raises InputError for bad input, Interrupted after a signal.
    """
    config = _config(config, overrides or [])
    trackers.check(config.log.report_to)
    folder, log = Path(config.output_dir), metrics.Log()
    with ExitStack() as held:
        locked = resume and _is_folder(folder)
        if locked:  # or another run could remove what this one reads
            held.enter_context(_held(folder, log))
        return _finetune(config, folder, resume, None if locked else held, log)


def _finetune(config: Config, folder: Path, resume: bool, to_lock: ExitStack | None, log: metrics.Log) -> Result:
    start = _start(folder, resume, log)
    if start is not None and config.model.revision is None:
        config = _pinned(config, checkpoint.read_progress(start)[1].get("revision"))
    base, train, valid = _load(config, log)
    config = _pinned(config, base.identity.get("revision"))
    paths = _attach(config, base, config.lora.start_from if start is None else None)
    then = None if start is None else checkpoint.read_progress(start)
    config = _planned(config, base, train, valid, log, then[1] if then else None)
    contract = _contract(config, base, train, valid)
    if start is not None and then is not None:
        progress, contract_then = then
        for note in checkpoint.check(start, contract_then, contract):
            log.say(note)
        log.say(f"resuming {folder} at step {progress.step}")
    counts = lora.count(base.model)
    log.say(
        f"adapting {len(paths)} layers: {counts.trainable:,} of {counts.total:,} parameters train "
        f"({100 * counts.trainable / counts.total:.2f} %); adapter {counts.adapter_bytes / 1e6:.1f} MB"
    )
    if to_lock is not None:  # a new run leaves nothing behind before it is known to be sound
        to_lock.enter_context(_held(folder, log))
        if checkpoint.latest(folder)[0] is not None:
            raise InputError(f"output_dir: another run wrote to {folder} meanwhile; choose another folder")
    _write_config(folder, config, base, train, valid)
    run = Run(config, base, train, valid, contract, log)
    try:
        result = run.fit(start)
    finally:
        _report(folder, log)
    best = "" if result.best_loss is None else f", best {result.best_loss:.4f} at step {result.best_step}"
    log.say(
        f"done: {result.steps} steps ({result.epochs:.3g} epochs) in {result.seconds:.0f} s, "
        f"loss {result.final_loss:.4f}{best}; adapter in {result.output_dir}"
    )
    return result


def _report(folder: Path, log: metrics.Log) -> None:
    """Writes the run as a page, on which no run depends."""
    try:
        page.write(folder / page.FILE, [page.read(folder)])
    except Exception as error:
        log.say(f"warning: {folder / page.FILE}: cannot be written ({error}); try python -m mlx_lora.report {folder}")


def dry_run(config: Config, log: metrics.Log) -> None:
    """Prints what a run would do; loads no weights."""
    log.say(config_file.dump(config))
    base, train, _ = _load(config, log, weights=False)
    paths = _attach(config, base, config.lora.start_from)
    adapted = lora.layers(base.model)
    kinds = Counter((path.rsplit(".", 1)[-1], _shape(adapted[path]), _size(adapted[path])) for path in paths)
    log.say("adapted modules:")
    for (name, shape, size), number in kinds.items():
        log.say(f"  {name:16} {number:4} x {shape:16} rank {config.lora.rank}  {number * size:>12,} parameters")
    counts = lora.count(base.model)
    log.say(f"  {counts.trainable:,} of {counts.total:,} parameters train")
    batches = train_batches(config, train.examples)
    steps = total_steps(config, batches)
    warmup = warmup_steps(config.train.schedule, steps)
    log.say(
        f"steps: {steps} ({batches.steps_per_epoch} an epoch, of {batches.batch_size * batches.accumulate} rows each); "
        f"padding efficiency {batches.padding_efficiency:.2f}"
    )
    if config.train.plan == "auto":
        log.say("train.plan: auto is made at the start of the run, when the weights are in memory")
    marks = sorted({0, warmup, (warmup + steps) // 2, steps - 1} & set(range(steps)))
    rates = ", ".join(f"step {mark + 1}: {learning_rate(config.train, mark, steps):.3g}" for mark in marks)
    log.say(f"learning rate ({config.train.schedule.name}, {warmup} steps of warmup): {rates}")


def _config(config: str | Path | dict[str, Any] | Config, overrides: list[str]) -> Config:
    if isinstance(config, (str, Path)):
        return config_file.load(config, overrides)
    if isinstance(config, Config):
        config = config.model_dump()
    return config_file.parse(config, overrides)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # the name is too long
        raise InputError(f"output_dir: {path} cannot be used ({error.strerror})") from None


def _start(folder: Path, resume: bool, log: metrics.Log) -> Path | None:
    """The checkpoint to go on from. Raises InputError where a new run would write over an old one."""
    try:
        taken = [name for name in (config_file.RUN_CONFIG, mlx_form.WEIGHTS) if (folder / name).exists()]
        start, complaints = checkpoint.latest(folder)
    except OSError as error:
        raise InputError(f"output_dir: {folder} cannot be used ({error.strerror})") from None
    if resume and before()[0] and not folder.is_dir():
        raise InputError(f"output_dir: {folder} has gone; bring it back, then go on with --resume")
    if taken == [mlx_form.WEIGHTS] and start is None:
        raise InputError(f"output_dir: {folder} holds an adapter that is no run of ours; choose another folder")
    if not resume:
        if taken or start is not None or complaints:
            raise InputError(
                f"output_dir: {folder} already holds a run; go on with it with --resume, or choose another folder"
            )
        return None
    for complaint in complaints:
        log.say(complaint)
    if start is None:
        if complaints or any(event["event"] == "saved" for _, event in metrics.events(folder / metrics.FILE)):
            raise InputError(
                f"{folder}: no checkpoint to go on from is left; start again in another output_dir, which keeps what "
                "is here"
            )
        log.say(f"{folder} holds no checkpoint yet: starting from the beginning")
    return start


def _load(config: Config, log: metrics.Log, weights: bool = True) -> tuple[Base, Dataset, Dataset | None]:
    """The base and the tokenized rows, all checked before the first step."""
    for note in model.prepare_device():
        log.say(note)
    data.check(config.data, [*config.data.train_paths, *config.data.valid_paths])
    base = model.load(config.model, weights, evaluated=False)
    tokenized = _meanwhile(lambda: data.load(config.data, base.tokenizer, log.say))
    if weights:
        model.evaluate(base.model)
    converted = f", as {base.folder}" if base.folder != Path(config.model.path) else ""
    log.say(f"model: {config.model.path}{converted}, on {model.device()}; base {model.describe(base.model)}")
    train, valid = tokenized.result()
    for line in train.account("train") + (valid.account("valid") if valid else ["valid: none"]):
        log.say(line)
    return base, train, valid


def _meanwhile(compute: Callable[[], T]) -> "Future[T]":
    """Starts a computation in a thread, for which no exit waits."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(compute())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def _attach(config: Config, base: Base, start_from: str | None) -> list[str]:
    """Attaches the adapter to train, new or that in `start_from`; returns the adapted paths."""
    paths = lora.attach(base.model, config.lora, config.train.seed)
    if start_from is None:
        return paths
    source = f"lora.start_from: {start_from}"
    adapter = adapter_files.read(start_from)
    if adapter.uniform is None:
        raise InputError(f"{source} has several ranks or alphas: make them one with mlx_lora.export --to mlx")
    rank, alpha = adapter.uniform
    if rank != config.lora.rank or not math.isclose(alpha, config.lora.alpha, rel_tol=1e-6):
        raise InputError(f"{source} has other settings: set lora.rank to {rank} and lora.alpha to {alpha:.9g}")
    if differing := sorted(set(paths) ^ set(adapter.pairs)):
        side = "adapts" if differing[0] in adapter.pairs else "does not adapt"
        names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in adapter.pairs}))
        blocks = sorted({number for path in adapter.pairs if (number := lora.block_number(path)) is not None})
        raise InputError(
            f"{source} {side} {differing[0]} (in all {len(differing)} modules differ): set lora.target_modules to "
            f"[{names}] and lora.layers to {blocks or 'all'}, or to what of these it adapts"
        )
    adapter_files.check(base.model, adapter, start_from)
    lora.set_parameters(base.model, adapter.arrays())
    return paths


def _pinned(config: Config, revision: str | None) -> Config:
    """The config with the commit that a hub id led to and the text of the chat template, so that the run goes on with
    these very weights, and what it leaves behind names them and says how they are asked."""
    found: dict[str, Any] = {}
    if not model.is_local(config.model.path):
        found["revision"] = revision
    if config.model.chat_template is not None:
        found["chat_template"] = chat.template_text(config.model.chat_template)
    return config.model_copy(update={"model": config.model.model_copy(update=found)})


def _planned(
    config: Config, base: Base, train: Dataset, valid: Dataset | None, log: metrics.Log, contract: dict[str, Any] | None
) -> Config:
    """The config with what `train.plan: auto` chooses in its place; a resumed run keeps what was chosen.

    Raises InputError where the run would need more than `train.memory_limit`.
    """
    limit = config.train.memory_limit
    allowed = memory.available(limit)
    with memory.limits(allowed):
        room = int(0.9 * allowed) - mx.get_active_memory()  # a tenth is for freed buffers
        if config.train.prefix_cache == "memory" and prefix.unusable(base.model) is None:
            room -= prefix.size(base.model, train_batches(config, train.examples))
        if config.train.plan == "auto":
            if contract is not None:
                chosen = {name: contract["train"].get(name) for name in PLANNED}
            else:
                options, lines = planning.choose(config, base.model, train.examples, room, model.can_compile())
                for line in lines:
                    log.say(line)
                chosen = {name: getattr(options, name) for name in PLANNED}
            config = config.model_copy(update={"train": config.train.model_copy(update={"plan": "manual", **chosen})})
        if limit is not None:
            rows = valid.examples if valid else []
            for line in planning.require(config, base.model, train.examples, rows, room, model.can_compile()):
                log.say(line)
    return config


def _contract(config: Config, base: Base, train: Dataset, valid: Dataset | None) -> dict[str, Any]:
    """Everything that the numbers of a run depend on: what `--resume` must find unchanged. Rows and weights are told
    by their digests, wherever they lie."""
    options = config.model_dump(
        include={"model", "lora", "train", "data"},
        exclude={"model": {"path", "revision"}, "data": {"train", "valid"}},
    )
    return options | {
        "base": base.identity["digest"],
        "revision": base.identity.get("revision"),
        "train_rows": train.digest,
        "valid_rows": valid.digest if valid else None,
        "order": ORDER,
        "versions": {"mlx": version("mlx"), "mlx_lm": version("mlx-lm")},
    }


@contextmanager
def _held(folder: Path, log: metrics.Log) -> Iterator[None]:
    """The run's folder, cleared of what killed runs left, for this run alone. Raises InputError where another one has
    it."""
    with ExitStack() as stack:
        try:
            (folder / adapter_files.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(files.locked(folder)):
                log.say(f"warning: {folder} is on a file system without locks: start no other run there")
            files.clear_temporaries(folder)
            files.clear_temporaries(folder / adapter_files.CHECKPOINTS)
        except OSError as error:
            raise InputError(f"output_dir: {folder} cannot be written ({error.strerror})") from None
        yield


def _write_config(folder: Path, config: Config, base: Base, train: Dataset, valid: Dataset | None) -> None:
    """config.yaml: the resolved config, headed by what else the run was made of."""
    try:
        facts = {
            "versions": f"mlx-lora {__version__}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
            "base": ", ".join(f"{name} {value}" for name, value in base.identity.items()),
            "train rows": f"{len(train.examples)}, sha256 {train.digest}",
            "valid rows": f"{len(valid.examples)}, sha256 {valid.digest}" if valid else "none",
        }
        with files.new_file(folder / config_file.RUN_CONFIG) as path:
            head = "".join(f"# {name}: {fact}\n" for name, fact in facts.items())
            path.write_text(head + config_file.dump(config), encoding="utf-8")
    except OSError as error:
        raise InputError(f"output_dir: {folder} cannot be written ({error.strerror})") from None


def _shape(layer: lora.LoRALayer) -> str:
    *experts, outputs, inputs = lora.weight_shape(layer.base)
    return f"{inputs} -> {outputs}" + (f" x {experts[0]} experts" if experts else "")


def _size(layer: lora.LoRALayer) -> int:
    return layer.lora_a.size + layer.lora_b.size


def _main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.supervise and options.dry_run:
        parser.error("--supervise: a dry run does not train")
    if options.supervise:
        command = [sys.executable, "-m", "mlx_lora.train", "--config", options.config]
        for override in options.set:
            command += ["--set", override]
        sys.exit(supervise([*command, *["--resume"] * options.resume], [*command, "--resume"]))
    if options.dry_run:
        dry_run(config_file.load(options.config, options.set), metrics.Log())
    else:
        finetune(options.config, options.set, options.resume)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora train",
        description="Fine-tune a model with LoRA.",
        epilog="Every option of the config: mlx-lora config-file reference",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of options (mlx-lora init makes one)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override an option; any number of times"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    mode.add_argument("--dry-run", action="store_true", help="print what would be done, load no weights")
    parser.add_argument(
        "--supervise", action="store_true", help="when the process dies, go on from the last checkpoint in a new one"
    )
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
