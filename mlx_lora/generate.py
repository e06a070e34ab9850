"""python -m mlx_lora.generate --adapter RUN "prompt": answer a prompt, with or without an adapter."""

import argparse
import sys
from collections.abc import Callable

from mlx_lora import adapter_files, generation, model
from mlx_lora.config import Model
from mlx_lora.errors import InputError, exit_code


def _main() -> None:
    options = _parser().parse_args()
    if not options.adapter and not options.model:
        raise InputError("give --adapter (a run's folder), --model, or both")
    if not options.model and (options.revision or options.dtype):
        raise InputError("--revision and --dtype go with --model; without it the adapter's run says them")
    if options.system and options.raw:
        raise InputError("--system has no place in a --raw prompt")
    for note in model.prepare_device():
        print(note, file=sys.stderr)
    base = model.load(
        Model(path=options.model, revision=options.revision, dtype=options.dtype or "auto")
        if options.model
        else adapter_files.base_of(options.adapter)
    )
    if options.adapter:
        adapter_files.load(base.model, options.adapter)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.system and base.tokenizer.chat_template is None:
        raise InputError("--system needs a chat template and the model has none")
    tokens = generation.prompt_tokens(base.tokenizer, prompt, options.system, options.raw)
    if not tokens:
        raise InputError("the prompt is empty")
    for piece in generation.stream(
        base.model,
        base.tokenizer,
        tokens,
        options.max_tokens,
        options.temperature,
        options.top_p,
        options.seed,
    ):
        print(piece, end="", flush=True)
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_lora.generate", description="Answer a prompt with a base model and, if given, an adapter."
    )
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--adapter", metavar="FOLDER", help="a run's folder, a checkpoint, or an adapter of mlx-lm")
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: the one the adapter was trained on")
    parser.add_argument("--revision", help="of a hub id given with --model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="compute type with --model")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--raw", action="store_true", help="the prompt as it stands, without the chat template")
    parser.add_argument("--max-tokens", type=_between(1, 2**31, int), default=256, help="longest answer (default 256)")
    parser.add_argument(
        "--temperature", type=_between(0, 100, float), default=0.0, help="0 is greedy (default); higher is more random"
    )
    parser.add_argument("--top-p", type=_between(0.01, 1, float), default=1.0, help="nucleus sampling (default 1: off)")
    parser.add_argument("--seed", type=_between(0, 2**64 - 1, int), default=0, help="of the sampling (default 0)")
    return parser


def _between(lowest: float, highest: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest} and {highest}")
        return value

    parse.__name__ = kind.__name__
    return parse


if __name__ == "__main__":
    sys.exit(exit_code(_main))
