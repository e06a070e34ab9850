"""python -m mlx_lora.init: four questions (model, data, goal, memory), and a commented config for a first run."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from mlx_lora import __version__, config_file, files
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
FLAGS = ("model", "data", "goal", "memory")
SHARE = 0.65  # of a machine's memory: up to 32 GB, macOS is reported to let the GPU have two thirds
QUANTIZED = re.compile(r"\d-?bit|bnb|gptq|awq|mxfp4|nvfp4|-dwq|\.gguf$", re.IGNORECASE)
SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


def _main() -> None:
    options = _parser().parse_args()
    missing = [name for name in FLAGS if getattr(options, name) is None]
    if missing and not sys.stdin.isatty():
        flags = " ".join(f"--{name}" for name in missing)
        raise InputError(f"there is nobody to ask (stdin is no terminal): give {flags}; see mlx-lora init --help")
    if files.exists(options.out):
        raise InputError(f"{options.out}: is there already; choose another file with --out")
    if missing:
        print("Enter takes what stands in brackets.")
    for name in missing:
        setattr(options, name, _ask(name))
    files.write_new(Path(options.out), text(options.model, options.data, options.goal, options.memory, options.out))
    if not files.exists(options.data):
        row = GOALS[options.goal][1].replace("\n", "")
        print(f"{options.data} is not there yet: put rows into it, each on one line:\n{row}")
    print(f"{options.out} is written. Look at what it would do, then train:")
    print(f"  mlx-lora train --config {options.out} --dry-run")
    print(f"  mlx-lora train --config {options.out}")


def text(model: str, data: str, goal: str, memory: float, out: str = "my.yaml") -> str:
    """A commented config for a model, a file of rows, a goal (one of GOALS) and a machine's memory in GB.

    Raises InputError for what no config may hold.
    """
    purpose, _, chosen = GOALS[goal]
    limit = round(SHARE * memory, 1)
    options: Options = {
        "model.path": (model, "hub id, local folder, or .gguf file"),
        "data.train": (data, "rows as above, one a line"),
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
        f"Train:        mlx-lora train --config {out}",
        "Every option: mlx-lora config-file reference",
        "Rows, each on one line:",
        *_row(goal, "  ").split("\n"),
    ]
    return config_file.commented(head, options)


def _row(goal: str, start: str) -> str:
    """What a row holds, in lines that start together after `start`."""
    return start + GOALS[goal][1].replace("\n", "\n" + " " * len(start))


def _parameters(model: str) -> float | None:
    """How many weights a model has, by its name (Qwen3-0.6B, SmolLM2-135M); None where that does not say."""
    found = SIZE.search(model.replace("_", "-").rpartition("/")[2])
    return None if found is None else float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6)


def _ask(name: str) -> Any:
    if name == "memory":
        return _until(f"Memory of the machine in GB [{_memory():g}]: ", _gigabytes, f"{_memory():g}")
    if name == "goal":
        print("What should the model learn?")
        for number, (goal, (purpose, _, _)) in enumerate(GOALS.items(), 1):
            print(f"  {number}  {goal:10}  to {purpose}\n{_row(goal, ' ' * 17)}")
        return _until("Goal [1]: ", _goal, "1")
    if name == "model":
        return _until(f"Model: hub id, folder, or .gguf file [{MODEL}]: ", str, MODEL)
    return _until("Data: a file of rows, a JSON object a line [data/train.jsonl]: ", str, "data/train.jsonl")


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
        raise argparse.ArgumentTypeError(f"{answer} is none of {', '.join(names)}")
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
    parser.add_argument("--data", metavar="FILE", help="file of rows, one JSON object a line")
    parser.add_argument("--goal", choices=list(GOALS), help="what is to be learned; see below")
    parser.add_argument("--memory", type=_gigabytes, metavar="GB", help="memory of the machine that will train")
    parser.add_argument("--out", default="my.yaml", metavar="FILE", help="a new file to write to (default my.yaml)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
