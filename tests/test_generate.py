"""The generate command as a person runs it: several adapters, comparison, chat, Ctrl-C; and the chat's cache."""

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import RotatingKVCache

from mlx_lora import finetune, generate, generation, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.errors import InputError, exit_code
from mlx_lora.generation import Conversation

ROOT = Path(__file__).parents[1]
QUESTIONS = ["What is it?", "Hello", "And then?", "Name one"]
ANSWERS = {"red": "red fox", "blue": "blue sky"}


@pytest.fixture(scope="session")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the tiny model by name, which taught it one answer to everything."""
    place = tmp_path_factory.mktemp("runs")
    for name, answer in ANSWERS.items():
        rows = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question in QUESTIONS
        ]
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        finetune(
            {
                "model": str(tiny_model),
                "data": {"train": str(data), "valid": 0},
                "lora": {"rank": 4, "alpha": 8},
                "train": {"max_steps": 150, "epochs": None, "batch_size": 4, "learning_rate": 0.01},
                "output_dir": str(place / name),
            }
        )
    return {name: place / name for name in ANSWERS}


def said(
    tiny_model: Path, blend: dict[Path, float], messages: list[dict[str, str]], max_tokens: int = 12, scale: float = 2.0
) -> str:
    """The greedy answer of mlx-lm itself, from the whole conversation at once, with the adapters' updates, formed in
    float64, in the base's weights."""
    network, tokenizer = mlx_lm.load(str(tiny_model))
    modules = dict(network.named_modules())
    for run, weight in blend.items():
        arrays = {
            name: np.array(array).astype(np.float64) for name, array in mx.load(str(run / mlx_form.WEIGHTS)).items()
        }
        for path in {name.rpartition(".")[0] for name in arrays}:
            update = weight * scale * (arrays[f"{path}.lora_a"] @ arrays[f"{path}.lora_b"]).T
            modules[path].weight = mx.array((tiny.float64(modules[path].weight) + update).astype(np.float32))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(network, tokenizer, prompt, max_tokens=max_tokens)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process and returns its exit code, its output and its errors."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        capsys.readouterr()
        code = exit_code(generate._main)
        return code, *capsys.readouterr()

    return command


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- one prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.5), (-0.3, 1.2), (0.0, 0.0)])
def test_several_adapters_answer_as_their_weighted_sum(
    tiny_model: Path, runs: dict[str, Path], command: Any, weights: tuple[float, float]
) -> None:
    red, blue = runs.values()
    adapters = ["--adapter", f"r={red}:{weights[0]}", "--adapter", f"{blue}:{weights[1]}"]
    code, out, err = command(*adapters, "--max-tokens", "12", "Hello")
    assert (code, err) == (0, "")
    assert out == said(tiny_model, {red: weights[0], blue: weights[1]}, [user("Hello")]) + "\n"
    assert weights != (1.0, 0.0) or out == "red fox\n"


def test_compare_prints_what_separate_runs_print(tiny_model: Path, runs: dict[str, Path], command: Any) -> None:
    sampling = ["--temperature", "1.0", "--seed", "7", "--max-tokens", "9", "Name one"]
    _, base, _ = command("--model", tiny_model, *sampling)
    _, tuned, _ = command("--adapter", f"{runs['red']}:0.4", *sampling)
    both = command("--adapter", f"{runs['red']}:0.4", "--compare", *sampling)
    assert base != tuned
    assert both == (0, f"base:\n{base}\ntuned:\n{tuned}", "")


@pytest.mark.parametrize("size", [500, 511])
def test_an_answer_ends_where_the_context_does(tiny_model: Path, command: Any, size: int) -> None:
    """The bare base writes newlines without end, and has 512 positions."""
    code, out, _ = command("--model", tiny_model, "--raw", "--max-tokens", "10000", size * "x")
    assert (code, len(out)) == (0, 512 - size + 1)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 64, "text_config": None}, 64),
        ({}, None),
    ],
)
def test_the_context_length_is_the_configs(config: dict[str, Any], length: int | None) -> None:
    base = model.Base(nn.Module(), None, config, Path(), {})
    assert generation.context_length(base) == length
    assert generation.longest_answer(100, 7 * [1], length) == (100 if length is None else min(100, length - 7))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-40, 1e-5, 1e-4])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_low_temperature_is_greedy(dtype: mx.Dtype, temperature: float, top_p: float) -> None:
    logits = mx.zeros((1, 50000)).at[0, 3].add(1.0)  # every logarithm is near -10
    logprobs = (logits - mx.logsumexp(logits)).astype(dtype)
    sample = generation.sampler(temperature, top_p)
    assert {sample(logprobs).item() for _ in range(20)} == {3}


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_samples_have_the_shares_of_the_temperature(dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    logprobs = mx.log(mx.array([0.1, 0.2, 0.7]))
    drawn = np.array(generation.sampler(0.5, 1.0)(mx.broadcast_to(logprobs, (20000, 3)).astype(dtype)))
    squares = np.array([0.01, 0.04, 0.49])
    assert np.abs(np.bincount(drawn, minlength=3) / 20000 - squares / squares.sum()).max() < 0.015


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_on_a_pipe(tiny_model: Path, runs: dict[str, Path], run_command: Any) -> None:
    """Every answer is mlx-lm's to the whole conversation so far, with the adapters that are in use then."""
    red, blue = runs.values()
    lines = [
        "Hello",
        "/base",
        "And then?",
        "",
        "/adapter blue:0.6 red:0.3",
        "What /is it?",
        "/adapter blue",
        "Name one",
    ]
    lines += [
        "/adapter green",
        "/adapter red:0.5 red:0.2",
        "/adapter",
        "/nothing",
        "/reset",
        "Hello",
        "/help",
        "/quit",
        "never read",
    ]
    blends = {"Hello": {red: 1.0}, "And then?": {}, "What /is it?": {red: 0.3, blue: 0.6}, "Name one": {blue: 1.0}}
    messages = [{"role": "system", "content": "Be brief"}]
    expected = []
    for text, blend in blends.items():
        messages.append(user(text))
        expected.append(said(tiny_model, blend, messages))
        messages.append(assistant(expected[-1]))
    expected.append(said(tiny_model, {blue: 1.0}, [messages[0], user("Hello")]))
    options = ["--adapter", red, "--adapter", f"{blue}:0", "--system", "Be brief", "--max-tokens", "12"]
    ended = run_command("generate", *options, "--chat", input="\n".join(lines) + "\n")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "".join(f"{answer}\n" for answer in expected)
    assert ended.stderr.splitlines() == [
        "(base; also loaded: red, blue)",
        "(red x 0.3 + blue x 0.6)",
        "(blue; also loaded: red)",
        "error: no adapter is named green; loaded: red, blue",
        "error: red is named twice; give it one weight",
        "(blue; also loaded: red)",
        "error: there is no command /nothing; /help lists them",
        "(blue; also loaded: red, nothing said yet)",
        *generate.CHAT_HELP.splitlines(),
    ]


def test_a_conversation_longer_than_the_context(
    tiny_model: Path, runs: dict[str, Path], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as if the message had never been sent."""
    red = runs["red"]
    lines = ["Hello", 500 * "x", "And then?"]
    messages = [user("Hello"), assistant("red fox"), user("And then?")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = command("--adapter", red, "--chat", "--max-tokens", "12")
    assert (code, out) == (0, f"red fox\n{said(tiny_model, {red: 1.0}, messages)}\n")
    assert err == "error: the conversation is longer than the model's context (512 tokens); /reset starts a new one\n"


class Reader:
    """What comes from a file descriptor, up to words that are waited for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""

    def wait(self, words: bytes, seconds: float = 120) -> bytes:
        """Everything up to and including `words`."""
        end = time.monotonic() + seconds
        while words not in self._rest:
            ready = select.select([self._descriptor], [], [], max(0, end - time.monotonic()))[0]
            if not ready:
                raise TimeoutError(f"no {words!r} after {self._rest!r}")
            part = os.read(self._descriptor, 4096)
            assert part, f"ended without {words!r}, after {self._rest!r}"
            self._rest += part
        got, _, self._rest = self._rest.partition(words)
        return got + words


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts the command as a process, on pipes or on a terminal of its own (a file descriptor)."""
    started = []

    def start(*arguments: str | Path, terminal: int | None = None) -> subprocess.Popen[bytes]:
        code = (
            "import fcntl, runpy, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # Ctrl-C signals the session that the terminal belongs to
            "runpy.run_module('mlx_lora.generate', run_name='__main__')"
        )
        python = ["-m", "mlx_lora.generate"] if terminal is None else ["-c", code]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE if terminal is None else terminal)
        command = [sys.executable, *python, *map(str, arguments)]
        strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in a UTF-8 locale, whatever this one is
        new = subprocess.Popen(command, start_new_session=terminal is not None, cwd=ROOT, env=strict, **streams)
        started.append(new)
        return new

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def endless(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that no test fills: it writes newlines without end."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**9}))
    return folder


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(runs: dict[str, Path], endless: Path, start: Any) -> None:
    process = start("--model", endless, "--adapter", f"{runs['red']}:0", "--chat", "--max-tokens", str(10**6))
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    Reader(process.stdout.fileno()).wait(b"\n\n")
    process.send_signal(signal.SIGINT)
    Reader(process.stderr.fileno()).wait(b" (stopped)")
    out, err = process.communicate(b"/reset\n/adapter red\nHello\n", timeout=120)
    assert process.returncode == 0
    assert out.endswith(b"\nred fox\n")
    assert b"Traceback" not in err


def test_ctrl_c_ends_an_answer_outside_a_chat_with_130(endless: Path, start: Any) -> None:
    process = start("--model", endless, "--max-tokens", str(10**6), "Hello")
    Reader(process.stdout.fileno()).wait(b"\n\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err


def interrupt(terminal: int, screen: Reader) -> None:
    """Ctrl-C at the prompt. The echo of what was typed precedes the wait for more by a moment in which Ctrl-C is only
    noted, until another one comes."""
    for _ in range(6):
        os.write(terminal, b"\x03")
        with contextlib.suppress(TimeoutError):
            screen.wait(b"(Ctrl-D or /quit ends)", 10)
            return
    raise AssertionError("Ctrl-C does nothing")


def test_a_terminal_has_a_prompt_a_table_and_survives_ctrl_c_at_the_prompt(runs: dict[str, Path], start: Any) -> None:
    outer, inner = os.openpty()
    screen = Reader(outer)
    chat = start("--adapter", runs["red"], "--chat", "--max-tokens", "12", terminal=inner)
    assert b"(red) /help lists the commands" in screen.wait(b"> ")
    os.write(outer, b"Hello\n")
    screen.wait(b"red fox\r\n")
    screen.wait(b"> ")
    os.write(outer, b"half a line")
    screen.wait(b"half a line")
    interrupt(outer, screen)
    screen.wait(b"> ")
    os.write(outer, b"a\xff\n")  # no text in UTF-8
    screen.wait(b"error: standard input is not valid text")
    screen.wait(b"> ")
    os.write(outer, b"Hello\n")
    screen.wait(b"red fox\r\n")
    screen.wait(b"> ")
    os.write(outer, b"\x04")
    assert chat.wait(120) == 0
    table = start("--adapter", runs["red"], "--compare", "--max-tokens", "7", "Hello", terminal=inner)
    assert b"base" in screen.wait(b"tuned").splitlines()[-1]
    screen.wait(b"red fox")
    assert table.wait(120) == 0
    os.close(outer)
    os.close(inner)


# ---- the chat's cache ------------------------------------------------------------------------------------------------


def talkative(tiny_model: Path) -> tuple[nn.Module, Any, list[int]]:
    """A random model whose answers, in letters, depend on all that was said, and the lengths of what it was given."""
    tokenizer = model.load_tokenizer(tiny_model)
    base = tiny.qwen3(vocab_size=260, tie_word_embeddings=False)
    letters = mx.array([tokenizer.decode([token]).isalpha() for token in range(260)])
    larger = {"embed_tokens": 4, "q_norm": 8, "v_proj": 5, "o_proj": 5, "lm_head": letters[:, None]}

    def enlarged(path: str, array: mx.array) -> mx.array:
        return array * next((factor for name, factor in larger.items() if name in path), 1)

    base.update(tree_map_with_path(enlarged, base.parameters()))
    lengths: list[int] = []

    class Counting(type(base)):  # type: ignore[misc]
        def __call__(self, tokens: mx.array, **more: Any) -> mx.array:
            lengths.append(tokens.shape[1])
            return super().__call__(tokens, **more)

    base.__class__ = Counting
    return base, tokenizer, lengths


def whole(network: nn.Module, tokenizer: Any, messages: list[dict[str, Any]], max_tokens: int = 12) -> str:
    return mlx_lm.generate(network, tokenizer, generation.chat_prompt(tokenizer, messages), max_tokens=max_tokens)


def ask(conversation: Conversation, text: str, max_tokens: int = 12) -> str:
    return "".join(conversation.answer(text, max_tokens=max_tokens))


def test_the_cache_changes_no_answer_and_spares_what_was_read(tiny_model: Path) -> None:
    network, tokenizer, lengths = talkative(tiny_model)
    conversation, messages, answers = (
        Conversation(network, tokenizer, "Be odd"),
        [{"role": "system", "content": "Be odd"}],
        [],
    )
    for text in QUESTIONS:
        messages.append(user(text))
        prompt = len(generation.chat_prompt(tokenizer, messages))
        lengths.clear()
        answers.append(ask(conversation, text))
        read = sum(lengths) - 12
        assert read == prompt if len(answers) == 1 else 0 < read < prompt - 30
        assert answers[-1] == whole(network, tokenizer, messages)
        messages.append(assistant(answers[-1]))
        assert conversation.messages == messages
    assert len(set(answers)) == len(answers)
    assert answers[-1] != whole(network, tokenizer, [user(QUESTIONS[-1])])

    conversation.reset()
    lengths.clear()
    assert ask(conversation, "Hello") == whole(network, tokenizer, [*messages[:1], user("Hello")])
    conversation.forget_cache()
    lengths.clear()
    again = ask(conversation, "Hello")
    assert sum(lengths) - 12 == len(generation.chat_prompt(tokenizer, conversation.messages[:-1]))
    assert again == whole(network, tokenizer, conversation.messages[:-1])


def test_a_broken_off_answer_stays_as_far_as_it_was_written(tiny_model: Path) -> None:
    network, tokenizer, _ = talkative(tiny_model)
    conversation = Conversation(network, tokenizer)
    ask(conversation, "Hello")
    before = conversation.messages
    pieces = conversation.answer("And then?", max_tokens=12)
    pieces.close()
    assert conversation.messages == before  # never begun
    pieces = conversation.answer("And then?", max_tokens=12)
    written = ""
    while not written:
        written += next(pieces)
    pieces.close()
    assert conversation.messages == [*before, user("And then?"), assistant(written)]
    answer = ask(conversation, "Name one")
    assert answer == whole(network, tokenizer, conversation.messages[:-1])


def test_ctrl_c_between_two_layers_spoils_no_later_answer(tiny_model: Path) -> None:
    network, tokenizer, lengths = talkative(tiny_model)

    class Interrupted(type(network.layers[1])):  # type: ignore[misc]
        def __call__(self, *given: Any) -> mx.array:
            if len(lengths) == 5:  # the first layer's cache has this token already
                raise KeyboardInterrupt
            return super().__call__(*given)

    network.layers[1].__class__ = Interrupted
    conversation = Conversation(network, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        ask(conversation, "Hello")
    assert conversation.messages[-1]["role"] == "assistant"
    assert ask(conversation, "And then?") == whole(network, tokenizer, conversation.messages[:-1])


def test_a_message_without_a_prompt_leaves_no_trace(tiny_model: Path) -> None:
    network, tokenizer, _ = talkative(tiny_model)
    conversation = Conversation(network, tokenizer)
    with pytest.raises(InputError, match="not valid Unicode"):
        ask(conversation, "a\udcff")
    assert conversation.messages == []
    with pytest.raises(InputError, match="not valid Unicode"):
        Conversation(network, tokenizer, "a\udcff")


def test_a_cache_that_cannot_be_cut_is_made_anew(tiny_model: Path) -> None:
    network, tokenizer, _ = talkative(tiny_model)
    type(network).make_cache = lambda self: [RotatingKVCache(max_size=32) for _ in self.layers]
    conversation = Conversation(network, tokenizer)
    first = ask(conversation, "What is it, by the way, that you wanted?")
    conversation.reset()
    assert ask(conversation, "Hello") == whole(network, tokenizer, [user("Hello")]) != first


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "{red}"], "give a prompt, or --chat"),
        (["--adapter", "{red}", "--chat", "hi"], "a prompt has no place in a --chat"),
        (["--adapter", "{red}", "--chat", "--raw"], "--raw has no place in a --chat"),
        (["--adapter", "{red}", "--chat", "--compare"], "--compare has no place in a --chat"),
        (["--model", "{model}", "--compare", "hi"], "--compare needs an --adapter"),
        (["--adapter", "{red}", "--adapter", "{red}:0.5", "hi"], "an adapter is named red already"),
        (["--adapter", "{red}", "--adapter", "{other}", "hi"], "red and other were trained on different bases"),
        (["--adapter", "{red}:much", "hi"], "the weight 'much' is not a number between"),
        (["--adapter", "{tmp}/adapter-f16.gguf", "hi"], "a GGUF file is no adapter"),
        (["--adapter", "{red}", "--adapter", "x={tmp}/none", "hi"], "none: holds no adapter"),
        (["--adapter", "{tmp}/none", "--model", "{model}", "hi"], "none: holds no adapter"),
        (["--model", "{plain}", "--chat"], "--chat needs a chat template"),
        (["--model", "{plain}", "--system", "x", "hi"], "--system needs a chat template"),
        (["--model", "{model}", "--system", "a\udcff", "hi"], "not valid Unicode"),
        (["--model", "{model}", "--raw", 512 * "x"], "the prompt has 512 tokens: no room for an answer in the model's"),
        (["--model", "{model}", "--adapter", "{red}", "--compare", 512 * "x"], "no room for an answer in the model's"),
    ],
)
def test_bad_input_is_one_message(
    tiny_model: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    command: Any,
    arguments: list[str],
    words: str,
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    shutil.copytree(tiny_model, plain)
    (plain / "chat_template.jinja").unlink()
    shutil.copytree(runs["red"], other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace(str(tiny_model), str(plain)))
    places = {"red": runs["red"], "other": other, "plain": plain, "model": tiny_model, "tmp": tmp_path}
    code, out, err = command(*(text.format(**places) for text in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")


def test_an_adapter_that_was_trained_on_a_changed_base_gets_a_note(
    tiny_model: Path, runs: dict[str, Path], tmp_path: Path, command: Any
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model, changed)
    weights = mx.load(str(changed / "model.safetensors"))
    mx.save_safetensors(str(changed / "model.safetensors"), {name: 1.5 * each for name, each in weights.items()})
    code, _, err = command("--adapter", runs["red"], "--model", changed, "--max-tokens", "2", "Hello")
    assert code == 0
    assert err == f"note: red was trained on {tiny_model}, whose digest differs from the loaded base's\n"


@pytest.mark.parametrize("way", ["-", "--chat"])
def test_input_that_is_no_text(tiny_model: Path, command: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    code, out, err = command("--model", tiny_model, way)
    assert (code, out) == (2, "")
    assert err.startswith("error: standard input is not valid text")
