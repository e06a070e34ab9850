"""mlx-lora COMMAND: all commands in one, each of which is also python -m mlx_lora.COMMAND.

Nothing of a command is imported before it is the one that was asked for.
"""

import argparse
import importlib
import sys
from typing import Any

from mlx_lora import __version__
from mlx_lora.errors import InputError, exit_code

COMMANDS = {  # in the order in which a newcomer needs them
    "doctor": "check this machine, and say what to fix",
    "init": "write a config for a first run: asks for model, data, goal and memory",
    "convert-config": "turn a config of mlx-lm, axolotl, Unsloth, TRL or PEFT into ours",
    "train": "fine-tune a model; --dry-run shows what would be done",
    "evaluate": "score held-out rows with and without the adapter",
    "generate": "answer a prompt, compare answers, or chat",
    "combine": "make one adapter of several",
    "export": "write an adapter for llama.cpp, PEFT, mlx-lm or Ollama, or merge it",
    "serve": "answer over HTTP, in the form of OpenAI's API",
    "config-file": "print every option of a config",
    "completion": "print what makes a shell complete all this",
}
SHELLS = ("bash", "zsh", "tcsh")
FILES = ("FILE", "FOLDER", "RUN", "NAME=FOLDER", "[NAME=]FOLDER[:WEIGHT]")  # what stands for a path in --help


def main() -> None:
    """The installed command."""
    sys.exit(exit_code(_main))


def _main() -> None:
    parser = _parser()
    if len(sys.argv) == 1:
        parser.print_help(sys.stderr)
        sys.exit(2)
    options = parser.parse_args()
    sys.argv = [f"mlx-lora {options.command}", *options.arguments]
    if options.command == "completion":
        print(_completion(_completion_parser().parse_args().shell))
    else:
        _module(options.command)._main()


def _module(command: str) -> Any:
    return importlib.import_module(f"mlx_lora.{command.replace('-', '_')}")


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:15} {meaning}" for name, meaning in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mlx-lora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlx-lora COMMAND ...",
        description=f"LoRA fine-tuning on MLX.\n\ncommands:\n{commands}",
        epilog="mlx-lora COMMAND --help says more about one of them.\n\n"
        "A first run:\n"
        "  mlx-lora doctor\n"
        "  mlx-lora init --out my.yaml\n"
        "  mlx-lora train --config my.yaml\n"
        '  mlx-lora generate --adapter runs/my "Can I send it back?"',
    )
    parser.add_argument("--version", action="version", version=f"mlx-lora {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _completion_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora completion",
        description='Print a script that makes a shell complete commands, options and files, as in: eval "$(mlx-lora '
        'completion bash)" in ~/.bashrc.',
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def _completion(shell: str) -> str:
    """The script, made from the parsers of all commands."""
    try:
        import shtab
    except ModuleNotFoundError:
        raise InputError('completion needs shtab: pip install "mlx-lora[completion]"') from None
    whole = argparse.ArgumentParser(prog="mlx-lora")
    commands = whole.add_subparsers()
    for name, meaning in COMMANDS.items():
        parser = _completion_parser() if name == "completion" else _module(name)._parser()
        for action in parser._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE
        commands.add_parser(name, parents=[parser], add_help=False, help=meaning)
    return shtab.complete(whole, shell)


if __name__ == "__main__":
    main()
