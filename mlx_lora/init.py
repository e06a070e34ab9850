"""python -m mlx_lora.init: four questions (model, data, goal, memory), and a commented config for a first run.

Data that is there is looked at: what its rows hold makes a goal the likely one, and says how their columns are called.
"""

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lora import __version__, config_file, files
from mlx_lora.config import Data
from mlx_lora.data import Row, entries, formats
from mlx_lora.errors import InputError, exit_code

Options = dict[str, tuple[Any, str]]

MODEL = "Qwen/Qwen3-0.6B"
GOALS: dict[str, tuple[str, str, Options]] = {  # name: what it is for, what a row holds, and the options that follow
    "chat": (
        "answer as in these conversations",
        '{"messages": [{"role": "user", "content": "..."},\n {"role": "assistant", "content": "..."}]}',
        {"data.loss_on": ("assistant", "every answer is learned; last: only the last one")},
    ),
    "completion": (
        "complete a prompt",
        '{"prompt": "...", "completion": "..."}',
        {"data.loss_on": ("completion", "the completion is learned, the prompt only read")},
    ),
    "tools": (
        "call tools",
        '{"messages": [..., {"role": "assistant", "tool_calls": [...]}],\n "tools": [...]}',
        {
            "data.loss_on": ("assistant", "calls are learned like any answer"),
            "data.max_seq_length": (4096, "tokens; the tools stand in every row"),
            "data.on_overflow": ("drop", "half a call would teach half a call"),
        },
    ),
    "text": (
        "go on with texts as these (continued pretraining)",
        '{"text": "..."}',
        {
            "data.loss_on": ("all", "every token is learned"),
            "lora.rank": (64, "knowledge takes more room than manner"),
            "lora.alpha": (64.0, "the update is scaled by alpha / rank"),
            "train.epochs": (1, "texts that are seen again are learned by heart"),
        },
    ),
}
FITTING = {  # goals with which rows of a form can be trained on, the likely one first
    "messages": ("chat", "tools", "text"),
    "sharegpt": ("chat", "tools", "text"),
    "completion": ("completion", "chat", "tools", "text"),
    "alpaca": ("completion", "chat", "tools", "text"),
    "text": ("text",),
}
PROMPTS = ("prompt", "question", "instruction", "query", "input", "request", "user")  # names of columns
ANSWERS = ("completion", "answer", "response", "output", "reply", "target", "label", "assistant")
LOOKED_AT = 100  # rows
FLAGS = ("model", "data", "goal", "memory")
SHARE = 0.65  # of a machine's memory: up to 32 GB, macOS is reported to let the GPU have two thirds
QUANTIZED = re.compile(r"\d-?bit|bnb|gptq|awq|mxfp4|nvfp4|-dwq|\.gguf$", re.IGNORECASE)
SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """What rows hold: the names of their columns, their form ("": it cannot be told), the options that say so, and
    whether they call tools."""

    names: list[str]
    form: str = ""
    options: Options = field(default_factory=dict)
    tools: bool = False
    unread: tuple[str, ...] = ()  # columns that nothing is made of

    @property
    def goals(self) -> list[str]:
        """Those that go with the rows, the likely one first."""
        return list(dict.fromkeys([*["tools"] * self.tools, *FITTING.get(self.form, GOALS)]))

    @property
    def listed(self) -> str:
        """The names of the first columns."""
        return ", ".join(self.names[:10]) + ", ..." * (len(self.names) > 10)


def _main() -> None:
    options = _parser().parse_args()
    rows = look(options.data) if options.data is not None else None
    if rows is not None and rows.form and options.goal is None:
        options.goal = rows.goals[0]
    missing = [name for name in FLAGS if getattr(options, name) is None]
    if missing and not sys.stdin.isatty():
        flags = " ".join(f"--{name}" for name in missing)
        raise InputError(f"there is nobody to ask (stdin is no terminal): give {flags}; see mlx-lora init --help")
    if files.exists(options.out):
        raise InputError(f"{options.out}: is there already; choose another file with --out")
    if missing:
        print("Enter takes what stands in brackets.")
    for name in missing:
        setattr(options, name, _ask(name, rows))
        rows = look(options.data) if name == "data" else rows
    made = text(options.model, options.data, options.goal, options.memory, options.out, rows)
    files.write_new(Path(options.out), made)
    if rows is None and not options.data.startswith("hub:"):
        row = GOALS[options.goal][1].replace("\n", "")
        print(f"{options.data} is not there yet: put rows into it, each on one line:\n{row}")
    elif rows is not None and not rows.form:
        print(f"{options.data} holds {rows.listed}: say in {options.out} which of them are to be learned, such as")
        print(f"  data: {{columns: {{prompt: {rows.names[0]}, completion: {rows.names[-1]}}}}}")
    out = shlex.quote(options.out)
    print(f"{options.out} is written. Look at its rows, ask whether it fits, then train:")
    print(f"  mlx-lora data {out}")
    print(f"  mlx-lora plan {out}")
    print(f"  mlx-lora train --config {out}")


def look(source: str) -> Rows | None:
    """What the first rows of a file or folder hold; None where there is none, as of the hub.

    Raises InputError for what cannot be read.
    """
    path = Path(source).expanduser()
    if not files.exists(path):
        return None
    found = list(islice(entries(path), LOOKED_AT))
    rows = [entry.content for entry in found if isinstance(entry, Row) and entry.content]
    if not rows:
        raise InputError(next((entry for entry in found if isinstance(entry, str)), f"{source}: its rows are empty"))
    return _held(rows)


def _held(rows: list[dict[str, Any]]) -> Rows:
    first, names = rows[0], list(rows[0])
    columns: dict[str, str] = {}
    forms = [form for form, keys in formats.KEYS.items() if first.keys() >= set(keys)]
    if not forms:
        columns = _columns(first)
        forms = [form for form, keys in formats.KEYS.items() if columns.keys() >= set(keys)]
    if not forms:
        return Rows(names)
    form = min(forms, key=lambda form: form == "text")  # a text beside others is made of them
    options: Options = {}
    if columns:
        options["data.columns"] = columns, "as the rows call them"
    if len(forms) > 1:
        options["data.format"] = form, f"of {' and '.join(forms)}, which the rows hold"
    config = Data.model_validate({"train": "-", "format": form, "columns": columns})
    try:
        contents = [formats.content(formats.renamed(row, config), form, config) for row in rows]
    except InputError:  # some rows are faulty, which mlx-lora data will say
        contents = []
    tools = any(row.get("tools") or any(map(_calls, row.get("messages", []))) for row in contents)
    read = {*formats.KEYS[form], *columns.values(), "tools", "system", "input"}
    return Rows(names, form, options, tools, tuple(name for name in names if name not in read))


def _columns(row: dict[str, Any]) -> dict[str, str]:
    """Which columns of a row are prompt and completion, messages or text, where that is plain; else none."""
    turns = {name: found for name, value in row.items() if (found := _turn(value))}
    if len(turns) == 1:
        return {"conversations" if "from" in turn else "messages": name for name, turn in turns.items()}
    lower = {name.lower(): name for name in row}
    prompts, answers = ([lower[name] for name in known if name in lower] for known in (PROMPTS, ANSWERS))
    if len(prompts) == len(answers) == 1:
        return {"prompt": prompts[0], "completion": answers[0]}
    return {"text": next(iter(row))} if len(row) == 1 else {}


def text(model: str, data: str, goal: str, memory: float, out: str = "my.yaml", rows: Rows | None = None) -> str:
    """A commented config for a model, rows (and what they hold, where they are there), a goal (one of GOALS) and a
    machine's memory in GB.

    Raises InputError for what no config may hold, and for a goal that the rows do not go with.
    """
    if rows is not None and goal not in rows.goals:
        raise InputError(f"{data}: holds rows of {rows.form}, with which the goal is {' or '.join(rows.goals)}")
    purpose, _, chosen = GOALS[goal]
    rows_comment = "rows as above, one a line"
    if rows is not None:
        unread = f"; not read: {', '.join(rows.unread[:10])}" if rows.unread else ""
        rows_comment = f"rows of {rows.form}{unread}" if rows.form else f"columns to name: {rows.listed}"
    limit = round(SHARE * memory, 1)
    options: Options = {
        "model.path": (model, "hub id, local folder, or .gguf file"),
        "data.train": (data, rows_comment),
        "data.valid": (0.05, "share held out, to see how well it goes"),
        "data.max_seq_length": (2048, "tokens; shorter takes less memory"),
        "lora.rank": (16, "size of the adapter"),
        "lora.alpha": (32.0, "the update is scaled by alpha / rank"),
        "train.epochs": (3, "passes over the rows"),
        "train.learning_rate": (1e-4, "lower if the loss jumps, higher if it barely falls"),
        "train.memory_limit": (limit, f"of {memory:g} GB: the rest is for the system"),
        "train.plan": ("auto", "compute a step in such a way that it fits in that"),
        "output_dir": (f"runs/{Path(out).stem}", "the adapter, its checkpoints and the log"),
        **chosen,
        **(rows.options if rows is not None else {}),
    }
    size = _parameters(model)
    if size is not None and not QUANTIZED.search(model) and 2 * size > limit * 1e9 / 2:
        dense, packed = 2 * size / 1e9, 4.5 / 8 * size / 1e9
        why = f"{packed:.1f} GB of weights, not {dense:.1f}"
        if packed > limit:
            why += ": take a smaller model"
        options["model.quantize"] = {"bits": 4}, why
    values = {name: value for name, (value, _) in options.items()}
    config_file.parse(config_file.nested(values), source="mlx-lora init")
    head = [
        f"To {purpose}.",
        f"Made by mlx-lora init {__version__}; nothing in it was measured on your machine.",
        f"Train:        mlx-lora train --config {shlex.quote(out)}",
        "Every option: mlx-lora config-file reference",
    ]
    if rows is None:
        head += ["Rows, each on one line:", *_row(goal, "  ").split("\n")]
    return config_file.commented(head, options)


def _row(goal: str, start: str) -> str:
    """What a row holds, in lines that start together after `start`."""
    return start + GOALS[goal][1].replace("\n", "\n" + " " * len(start))


def _turn(value: Any) -> dict[str, Any]:
    """The first message of a conversation, which tables hold as JSON text; {} for any other value."""
    try:
        found = formats.content({"messages": value}, "messages", Data(train="-"))["messages"][0]
    except InputError:
        return {}
    return found if isinstance(found, dict) and {"role", "from"} & found.keys() else {}


def _calls(message: Any) -> bool:
    return isinstance(message, dict) and bool(message.get("tool_calls"))


def _parameters(model: str) -> float | None:
    """How many weights a model has, by its name (Qwen3-0.6B, SmolLM2-135M); None where that does not say."""
    found = SIZE.search(model.replace("_", "-").rpartition("/")[2])
    return None if found is None else float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6)


def _ask(name: str, rows: Rows | None) -> Any:
    if name == "memory":
        return _until(f"Memory of the machine in GB [{_memory():g}]: ", _gigabytes, f"{_memory():g}")
    if name == "goal":
        print("What should the model learn?")
        for number, (goal, (purpose, _, _)) in enumerate(GOALS.items(), 1):
            print(f"  {number}  {goal:10}  to {purpose}\n{_row(goal, ' ' * 17)}")
        likely = 1 if rows is None else 1 + list(GOALS).index(rows.goals[0])
        return _until(f"Goal [{likely}]: ", _goal, str(likely))
    if name == "model":
        return _until(f"Model: hub id, folder, or .gguf file [{MODEL}]: ", str, MODEL)
    return _until("Data: file or folder of rows (.jsonl, .csv, ...) [data/train.jsonl]: ", str, "data/train.jsonl")


def _until(question: str, read: Any, default: str) -> Any:
    """Asks until the answer can be read; Enter takes the default."""
    while True:
        try:
            return read(input(question).strip() or default)
        except argparse.ArgumentTypeError as error:
            print(f"  {error}")
        except EOFError:
            raise KeyboardInterrupt from None


def _goal(answer: str) -> str:
    names = list(GOALS)
    if answer.isdecimal() and 1 <= int(answer) <= len(names):
        return names[int(answer) - 1]
    if answer not in names:
        raise argparse.ArgumentTypeError(f"{answer} is none of 1 to {len(names)}, nor {', '.join(names)}")
    return answer


def _gigabytes(answer: str) -> float:
    try:
        number = float(answer.lower().removesuffix("gb"))
    except ValueError:
        number = 0.0
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{answer} is no number of GB from 1 on")
    return number


def _memory() -> float:
    """The machine's memory, in GB as it is sold."""
    return float(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora init",
        description="Write a commented config for a first run. What is not given is asked.",
        epilog="goals: " + "; ".join(f"{goal}: {purpose}" for goal, (purpose, _, _) in GOALS.items()),
    )
    parser.add_argument("--model", help=f"hub id, folder or .gguf file, such as {MODEL}")
    parser.add_argument("--data", metavar="ROWS", help="file or folder of rows (.jsonl, .csv, .parquet, .txt, ...)")
    parser.add_argument("--goal", choices=list(GOALS), help="what is to be learned; default: seen by the rows")
    parser.add_argument("--memory", type=_gigabytes, metavar="GB", help="memory of the machine that will train")
    parser.add_argument("--out", default="my.yaml", metavar="FILE", help="a new file to write to (default my.yaml)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
