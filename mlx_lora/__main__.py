"""mlx-lora COMMAND: all commands in one, each of which is also python -m mlx_lora.COMMAND.

Nothing of a command is imported before it is the one that was asked for.
"""

import argparse
import difflib
import importlib.util
import sys
from typing import Any

from mlx_lora import __version__
from mlx_lora.errors import InputError, exit_code

COMMANDS = {  # in the order in which a newcomer needs them
    "doctor": "check this machine, and say what to fix",
    "init": "write a config for a first run, from four questions",
    "convert-config": "turn a config of mlx-lm, axolotl, TRL or Unsloth into ours",
    "config-file": "print every option of a config, with its meaning",
    "data": "look at your rows: what is learned, and what is wrong",
    "plan": "say whether a run fits in memory, before any download",
    "train": "fine-tune a model; --dry-run shows what would be done",
    "evaluate": "score held-out rows with and without what was learned",
    "generate": "ask the model: one prompt, with and without, or a chat",
    "report": "show a run, or several, as one page",
    "combine": "make one adapter of several",
    "export": "hand the result to llama.cpp, Ollama, PEFT, mlx-lm or the hub",
    "serve": "answer over HTTP, in the form of OpenAI's API",
    "completion": "print what makes a shell complete all this",
}
SHELLS = ("bash", "zsh", "tcsh")


def main() -> None:
    """The installed command."""
    sys.exit(exit_code(_main))


def _main() -> None:
    parser = _parser()
    if len(sys.argv) == 1:
        parser.print_help(sys.stderr)
        sys.exit(2)
    options = parser.parse_args()
    if options.command not in COMMANDS:
        near = difflib.get_close_matches(options.command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "mlx-lora --help lists all"
        raise InputError(f"there is no command {options.command!r}; {hint}")
    sys.argv = [f"mlx-lora {options.command}", *options.arguments]
    if options.command == "completion":
        print(_completion(_completion_parser().parse_args().shell))
    else:
        _module(options.command)._main()


def _module(command: str) -> Any:
    """The module of a command, with `_main` and `_parser`: of a package, its `__main__`."""
    name = f"mlx_lora.{command.replace('-', '_')}"
    spec = importlib.util.find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.import_module(f"{name}.__main__" if is_package else name)


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:15} {meaning}" for name, meaning in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mlx-lora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlx-lora COMMAND ...",
        description="Teach a language model something new, from your own data, on your own machine:\n"
        f"LoRA fine-tuning on MLX.\n\ncommands:\n{commands}",
        epilog="mlx-lora COMMAND --help says more about one of them.\n\n"
        "A first run:\n"
        "  mlx-lora doctor\n"
        "  mlx-lora init --out my.yaml\n"
        "  mlx-lora train --config my.yaml\n"
        '  mlx-lora generate --adapter runs/my "Can I send it back?"',
    )
    parser.add_argument("--version", action="version", version=f"mlx-lora {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _completion_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora completion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print a script that makes a shell complete commands, options and files.",
        epilog="once, for bash with the package bash-completion, or for zsh:\n"
        "  mlx-lora completion bash > ~/.local/share/bash-completion/completions/mlx-lora\n"
        '  mlx-lora completion zsh > "${fpath[1]}/_mlx-lora"',
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
            if action.choices is None and action.type is None and action.nargs != 0:
                setattr(action, "complete", shtab.FILE)  # noqa: B010  (an attribute of shtab's)
        commands.add_parser(name, parents=[parser], add_help=False, help=meaning)
    return shtab.complete(whole, shell)


if __name__ == "__main__":
    main()
