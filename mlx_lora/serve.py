"""python -m mlx_lora.serve --adapter NAME=RUN: an HTTP API in OpenAI's style, on this machine only by default.

A request chooses by its `model`: the base's name or `base`, the name of an adapter, or a blend `NAME:0.7+NAME:0.3`.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mlx_lora import adapter_files, model
from mlx_lora.config import Model
from mlx_lora.errors import InputError, exit_code


def _main() -> None:
    options = _parser().parse_args()
    try:
        from mlx_lora.server import app
        from mlx_lora.server.worker import Worker
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in ("starlette", "uvicorn", "h11"):
            raise
        raise InputError(f'the server needs {package}: pip install "mlx-lora[serve]"') from None
    if options.api_key and not re.fullmatch(r"[!-~]+", options.api_key):
        raise InputError(
            "the API key (--api-key or MLX_LORA_API_KEY) may have printable ASCII characters only, no spaces"
        )
    adapters = _adapters(options.adapter)
    base = Model(path=options.model) if options.model else _base_of(adapters)
    name = _name(base.path)
    if clash := {name, "base"} & adapters.keys():
        raise InputError(f"--adapter: {clash.pop()} is the base's name; give the adapter another")
    with app.listen(options.host, options.port) as listener, Worker(options.max_waiting) as worker:
        hosts = app.hosts(listener)
        if hosts is None and not options.api_key:
            print(
                f"warning: whoever reaches {options.host} can use this server; set an API key (MLX_LORA_API_KEY)",
                file=sys.stderr,
            )
        for note in model.prepare_device():
            print(note, file=sys.stderr)
        model.resolve(base)  # downloads in this thread, where Ctrl-C ends it
        for note in worker.load(base, adapters):
            print(f"warning: {note}", file=sys.stderr)
        settings = app.Settings(
            name, list(adapters), options.max_tokens_limit, options.max_body, options.api_key, hosts
        )
        app.run(worker, settings, listener)


def _adapters(pairs: list[tuple[str, str]]) -> dict[str, str]:
    adapters = dict(pairs)
    if len(adapters) < len(pairs):
        raise InputError("--adapter: two adapters have the same name")
    return adapters


def _base_of(adapters: dict[str, str]) -> Model:
    """The base that all adapters were trained on."""
    bases = {name: adapter_files.base_of(folder) for name, folder in adapters.items()}
    if not bases:
        raise InputError("give --adapter NAME=FOLDER, --model, or both")
    first, *others = bases
    for other in others:
        if bases[other] != bases[first]:
            raise InputError(
                f"{first} was trained on {bases[first].path} and {other} on {bases[other].path}, or they load it "
                "differently; give the base to serve with --model"
            )
    return bases[first]


def _name(path: str) -> str:
    """What clients call a base: a hub id as it is, of a local path its last part only."""
    return Path(path).resolve().name if Path(path).exists() else path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora serve",
        description="Serve a base model and adapters over HTTP, in the form of OpenAI's API.",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        type=_pair,
        action="append",
        default=[],
        help="a run's folder, a checkpoint, or an adapter of mlx-lm or PEFT, and its name; may be repeated",
    )
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: the one the adapters were trained on")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=_whole(0, 65535), default=8080, help="0: any that is free (default 8080)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("MLX_LORA_API_KEY"),
        help="what clients must send; better in the environment, as MLX_LORA_API_KEY, than seen in lists of processes",
    )
    parser.add_argument(
        "--max-tokens-limit", type=_whole(1), default=4096, help="tokens in the longest answer (default 4096)"
    )
    parser.add_argument(
        "--max-waiting", type=_whole(1), default=32, help="requests that may wait for their turn (default 32)"
    )
    parser.add_argument("--max-body", type=_whole(1), default=2**21, help="bytes in a request (default 2097152)")
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, the name of letters, digits, dot, - and _")
    return name, folder


def _whole(lowest: int, highest: int = 2**31) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest} and {highest}")
        return value

    parse.__name__ = "whole number"
    return parse


if __name__ == "__main__":
    sys.exit(exit_code(_main))
