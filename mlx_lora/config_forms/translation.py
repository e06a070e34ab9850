"""Options of another tool, taken one after the other and set as ours; what nobody takes has no counterpart."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lora import files
from mlx_lora.errors import InputError

OFF: tuple[Any, ...] = (None, False, "", "none", "no", [], {})  # what is switched off there needs no counterpart
# Other hardware, logs and uploads: nothing that is learned depends on it.
AROUND = re.compile(
    r"(bf|fp|tf|bfloat|float)\d+|.*(attention|attn|kernel|liger|fsdp|deepspeed|ddp|dataloader|torch_compile|offload"
    r"|num_proc|device_map).*|torch_empty_cache_steps|local_rank|max_memory|gpu_memory_limit|lora_on_cpu"
    r"|low_cpu_mem_usage|accelerator_config|gradient_checkpointing_kwargs|dataset_processes|pad_to_.*|padding_free|log_.*|logging_nan.*"
    r"|hub_.*|((hf|wandb|auth|access|use_auth|push_to_hub)_)?token|.*(api_key|secret|password).*|per_device_eval_batch_size|eval_do_concat_batches|skip_memory_metrics|length_column_name|project"
)
TRACKERS = ("tensorboard", "wandb")
FORMATS = ("json", "csv", "parquet", "text")  # what `datasets` calls files that are no data set of the hub
HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".zst")  # of files of rows
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a group"}


class Translation:
    """Another tool's options on their way to ours.

    ``options`` are ours by key path, each with a comment; ``places`` says what each of them was made from; ``lost`` has
    a line for what has no counterpart.
    """

    def __init__(self, path: str, options: dict[str, Any], where: dict[str, str]) -> None:
        self.path = path
        self.form = ""
        self.options: dict[str, tuple[Any, str]] = {}
        self.places: dict[tuple[str, ...], str] = {}
        self.lost: list[str] = []
        self._left = {str(name): value for name, value in options.items()}
        # By the name that is asked for: where it stands, and what it is called there.
        self._said = {name: (place, name) for name, place in where.items()}

    def __contains__(self, name: str) -> bool:
        """Whether an option is there, switched on and not taken yet."""
        return self._left.get(name) not in OFF

    def is_null(self, name: str) -> bool:
        """Whether an option is there and null, which need not be its default."""
        return name in self._left and self._left[name] is None

    def rename(self, names: dict[str, str]) -> None:
        """Gives options the new names, where these are free."""
        for old, new in names.items():
            if old in self._left and new not in self._left:
                self._left[new] = self._left.pop(old)
                self._said[new] = self._said.get(old, (self.path, old))

    def take(self, name: str, default: Any = None, kind: type | None = None) -> Any:
        """The value of an option, or `default` where it is absent or null. Raises InputError for another kind."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if kind is None:
            return value
        if kind in (int, float):
            value = _number(value, kind)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong or (kind is int and abs(value) > 2**53):
            raise self.fault(name, f"is {KINDS[kind]}, got {_short(value)}")
        return value

    def set(self, key: str, value: Any, comment: str = "", of: str = "") -> None:
        """Sets an option of ours, which was made from theirs named `of`."""
        self.options[key] = value, comment
        if of in self._said:
            self.places[tuple(key.split("."))] = ": ".join(self._said[of])

    def lose(self, name: str, value: Any, why: str = "") -> None:
        """Notes that an option has no counterpart, unless it is switched off."""
        if value not in OFF:
            _, said = self._said.get(name, (self.path, name))
            self.lost.append(f"{said}: {_short(value)}{f' ({why})' if why else ''}")

    def drop(self, names: dict[str, str]) -> None:
        """Takes options that have no counterpart; `names` says why of each."""
        for name, why in names.items():
            self.lose(name, self.take(name), why)

    def left(self) -> list[tuple[str, Any]]:
        """The options that were not taken."""
        return list(self._left.items())

    def fault(self, name: str, what: str) -> InputError:
        """An error in an option of theirs."""
        place, said = self._said.get(name, (self.path, name))
        return InputError(f"{place}: {said}: {what}")

    def finish(self) -> list[str]:
        """The head of the new file: what has no counterpart, the options that nobody took included."""
        around = [name for name, value in self._left.items() if AROUND.fullmatch(name) and value not in OFF]
        for name, value in self._left.items():
            if name not in around:
                self.lose(name, value)
        lines = [f"Made from {self.path} ({self.form}). What meant something else there is said beside it."]
        if self.lost:
            lines += ["Without a counterpart here:", *(f"  {line}" for line in self.lost)]
        if around:
            lines.append("About hardware, logs and uploads, not needed here:")
            lines += [f"  {line}" for line in textwrap.wrap(", ".join(around), 100)]
        return lines


def rows(name: str, configuration: str | None = None, split: str | None = None) -> str:
    """A source of rows as data.train names it: what looks like a hub id and is not here is a data set of the hub."""
    hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and Path(name).suffix not in SUFFIXES and not files.exists(name)
    return _hub(name, configuration, split) if hub else name


def _hub(name: str, configuration: str | None, split: str | None) -> str:
    return f"hub:{name}" + (f"@{configuration}" if configuration else "") + (f":{split}" if split else "")


def data_set(options: Translation, of: str, given: Translation, split: str | None) -> list[str]:
    """The sources that `datasets.load_dataset(path, name, data_files=..., split=split)` reads, one at least; what else
    is in the group `given` is noted below `of`."""
    path, configurations, held = given.take("path"), given.take("name"), given.take("data_files")
    names = configurations if isinstance(configurations, list) else [configurations]
    held = held.get("train") if isinstance(held, dict) else held
    named = held if isinstance(held, list) else [held] if held else []
    if not isinstance(path, str) or not all(isinstance(one, str) for one in [*named, *filter(None, names)]):
        raise options.fault(of, "names a path, and if it likes a name and data_files, all of them text")
    revision = given.take("revision")
    if not files.exists(path) and path not in FORMATS and HUB.fullmatch(path) and Path(path).suffix not in SUFFIXES:
        options.lose(f"{of}: data_files", named, "of a data set of the hub, all files are read")
        options.lose(f"{of}: revision", revision, "the newest is read")
        return [_hub(path, one, split) for one in names]
    if split not in ("train", "test", "validation"):
        options.lose(f"{of}: split", split, "files are read whole")
    return named or [path]


def columns(options: Translation, found: Sequence[dict[str, str]], of: str) -> None:
    """Sets what rows call ours, by the names of each source: they have to be the same for all."""
    first, *others = [{ours: theirs for ours, theirs in names.items() if ours != theirs} for names in found]
    if any(names != first for names in others):
        options.lose(f"{of}: columns that differ", [first, *others], "one data.columns holds for all sources")
    elif first:
        options.set("data.columns", first, of=of)


def report(options: Translation, names: list[str], of: str, settings: dict[str, Any] | None = None) -> None:
    """Sets log.report_to; `settings` are W&B's variables of the environment, without WANDB_ in front."""
    for name in names:
        if name not in TRACKERS:
            options.lose(of, name, "only tensorboard and wandb are reported to")
    known = [name for name in TRACKERS if name in names]
    said = [f"WANDB_{name.upper()}={value}" for name, value in (settings or {}).items() if value]
    if known:
        comment = f"with {' '.join(said)} in the environment" if said and "wandb" in known else ""
        options.set("log.report_to", known, comment, of)


def _number(value: Any, kind: type) -> Any:
    """The number in a value, which YAML may hold as text (2e-4); a value that is none as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return value
    if isinstance(value, bool) or (kind is int and (isinstance(value, int) or not number.is_integer())):
        return value
    return int(number) if kind is int else number


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
