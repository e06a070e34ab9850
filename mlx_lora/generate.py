"""python -m mlx_lora.generate --adapter RUN "prompt": answer a prompt, or chat, with or without adapters."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_lora import adapter_files, generation, model
from mlx_lora.config import Model
from mlx_lora.errors import InputError, exit_code
from mlx_lora.live import LiveAdapters, Source, number

CHAT_HELP = """\
/adapter NAME[:WEIGHT] ...  use this adapter, or a blend; alone: which there are
/base                       use no adapter
/reset                      forget what was said
/quit                       end, as Ctrl-D does
Ctrl-C                      stop an answer"""


def _main() -> None:
    options = _parser().parse_args()
    _check(options)
    sources = [Source.parse(text) for text in options.adapter]
    chosen = _base(options, sources)
    for note in model.prepare_device():
        print(note, file=sys.stderr)
    base = model.load(chosen)
    if base.tokenizer.chat_template is None and (options.system or options.chat):
        raise InputError(f"{'--system' if options.system else '--chat'} needs a chat template and the model has none")
    live = LiveAdapters(base.model, base.identity)
    for source in sources:
        live.load(source.name, source.folder)
    for note in live.notes.values():
        print(f"note: {note}", file=sys.stderr)
    live.use({source.name: source.weight for source in sources})
    sampling = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    if options.chat:
        _chat(base, live, options.system, sampling)
        return
    prompt = _read(sys.stdin.read) if options.prompt == "-" else options.prompt
    tokens = generation.prompt_tokens(base.tokenizer, prompt, options.system, options.raw)
    if not tokens:
        raise InputError("the prompt is empty")
    context = generation.context_length(base)
    sampling["max_tokens"] = generation.longest_answer(options.max_tokens, tokens, context)
    if sampling["max_tokens"] < 1:
        raise InputError(
            f"the prompt has {len(tokens)} tokens: no room for an answer in the model's context ({context})"
        )
    if options.compare:
        _compare(base, live, tokens, sampling)
        return
    for piece in generation.stream(base.model, base.tokenizer, tokens, **sampling):
        print(piece, end="", flush=True)
    print()


def _check(options: argparse.Namespace) -> None:
    """Raises InputError for options that do not go together."""
    if not options.adapter and not options.model:
        raise InputError("give --adapter (a run's folder), --model, or both")
    if not options.model and (options.revision or options.dtype):
        raise InputError("--revision and --dtype go with --model; without it the adapter's run says them")
    if options.system and options.raw:
        raise InputError("--system has no place in a --raw prompt")
    if options.compare and not options.adapter:
        raise InputError("--compare needs an --adapter to compare the base with")
    if options.chat:
        for name, given in (
            ("a prompt", options.prompt is not None),
            ("--raw", options.raw),
            ("--compare", options.compare),
        ):
            if given:
                raise InputError(f"{name} has no place in a --chat")
    elif options.prompt is None:
        raise InputError("give a prompt, or --chat")


def _base(options: argparse.Namespace, sources: list[Source]) -> Model:
    """The base to load: the given one, or that of all adapters. Raises InputError where these are several."""
    if options.model:
        return Model(path=options.model, revision=options.revision, dtype=options.dtype or "auto")
    bases = [adapter_files.base_of(source.folder) for source in sources]
    for source, base in zip(sources, bases, strict=True):
        if base != bases[0]:
            raise InputError(
                f"{sources[0].name} and {source.name} were trained on different bases: {_words(bases[0])} and "
                f"{_words(base)}; say with --model which to use"
            )
    return bases[0]


def _words(base: Model) -> str:
    """A base's settings, those that are not the default."""
    return ", ".join(str(value) for _, value in base if value not in (None, "auto", {}))


def _compare(base: model.Base, live: LiveAdapters, tokens: list[int], sampling: dict[str, Any]) -> None:
    """Prints the answers without and with the adapters: side by side in a terminal, else one below the other."""
    answers = {}
    for name, switch in (("base", live.disable), ("tuned", live.enable)):
        switch()
        answers[name] = "".join(generation.stream(base.model, base.tokenizer, tokens, **sampling))
    console = Console()
    if console.is_terminal:
        table = Table(expand=True)
        for name in answers:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, answers.values()))
        console.print(table)
    else:
        print("\n\n".join(f"{name}:\n{answer}" for name, answer in answers.items()))


# ---- chat ------------------------------------------------------------------------------------------------------------


def _chat(base: model.Base, live: LiveAdapters, system: str | None, sampling: dict[str, Any]) -> None:
    """Answers line after line, until the input ends. What is said about the session itself goes to stderr."""
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        print(f"({_blend(live)}) /help lists the commands, Ctrl-D ends", file=sys.stderr)
    conversation = generation.Conversation(base.model, base.tokenizer, system, generation.context_length(base))
    while True:
        try:
            line = _read(lambda: input("> " if person else "")).strip()
        except EOFError:
            print(end="\n" if person else "")
            return
        except KeyboardInterrupt:
            if not person:
                raise
            print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
            continue
        except InputError as error:
            if not person:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        if line == "/quit":
            return
        try:
            if re.match(r"/\w+(\s|$)", line):
                _command(line, live, conversation)
            elif line:
                _answer(line, conversation, sampling)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _answer(line: str, conversation: generation.Conversation, sampling: dict[str, Any]) -> None:
    pieces = conversation.answer(line, **sampling)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="", file=sys.stderr)
    finally:
        pieces.close()
    print(flush=True)


def _command(line: str, live: LiveAdapters, conversation: generation.Conversation) -> None:
    command, *names = line.split()
    if command == "/adapter" and names:
        live.use(_weights(names, live))
        conversation.forget_cache()
    elif command == "/base":
        live.use(None)
        conversation.forget_cache()
    elif command == "/reset":
        conversation.reset()
    elif command == "/help":
        print(CHAT_HELP, file=sys.stderr)
        return
    elif command != "/adapter":
        raise InputError(f"there is no command {command}; /help lists them")
    print(f"({_blend(live)}{'' if command != '/reset' else ', nothing said yet'})", file=sys.stderr)


def _weights(names: list[str], live: LiveAdapters) -> Mapping[str, float]:
    """The blend that ``NAME[:WEIGHT] ...`` asks for."""
    blend: dict[str, float] = {}
    for text in names:
        name, colon, weight = (text, "", "") if text in live.names else text.rpartition(":")
        if not colon:
            name, weight = text, "1"
        if name in blend:
            raise InputError(f"{name} is named twice; give it one weight")
        blend[name] = number(weight, text)
    return blend


def _blend(live: LiveAdapters) -> str:
    """The adapters in words: those in use, and the others."""
    used = [name if weight == 1 else f"{name} x {weight:g}" for name, weight in live.active.items()]
    others = [name for name in live.names if name not in live.active]
    return (" + ".join(used) or "base") + (f"; also loaded: {', '.join(others)}" if others else "")


def _read(read: Callable[[], str]) -> str:
    """What `read` reads from standard input. Raises InputError where it is not text."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not valid text: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora generate",
        description="Answer a prompt, or chat, with a base model and, if given, adapters.",
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER[:WEIGHT]",
        help="a run's folder, a checkpoint, or an adapter of mlx-lm or PEFT; several are blended, each times its "
        "weight (default 1; with 0 it is only loaded, for /adapter NAME in a chat)",
    )
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: the one the adapters were trained on")
    parser.add_argument("--revision", help="of a hub id given with --model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="compute type with --model")
    parser.add_argument("--compare", action="store_true", help="the base's answer beside the tuned one")
    parser.add_argument("--chat", action="store_true", help="a conversation, line by line; /help lists its commands")
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
