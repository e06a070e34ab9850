"""The server as a process of its own, spoken to by the `openai` client and by bare sockets."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
import numpy as np
import openai
import pytest
import uvicorn
from conftest import ROOT
from mlx_lm import stream_generate
from tiny import randomize

from mlx_lora import generation, lora, model, serve
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Lora, Model
from mlx_lora.errors import InputError, exit_code
from mlx_lora.lora import Adapter
from mlx_lora.model import Base
from mlx_lora.server import app, protocol
from mlx_lora.server.worker import Job, Piece, StopStrings, Worker, _penalties

CONTEXT, MOST, BODY, WAITING = 200_000, 300_000, 20_000, 4
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Where is my parcel?"}], "max_tokens": 24}
LONG: dict[str, Any] = {**CHAT, "model": "poet", "max_tokens": 150_000, "temperature": 0}  # minutes


@dataclass
class Reply:
    status: int
    headers: Message
    text: bytes

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def post(self, path: str, body: Any) -> Reply:
        return self.ask("POST", path, body)

    def connect(self, text: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        with contextlib.suppress(ConnectionError):  # the server may refuse it before its end
            connection.sendall(text)
        return connection

    def raw(self, text: bytes) -> bytes:
        """What comes back until the server closes the connection."""
        with self.connect(text) as connection:
            return rest(connection)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def logs(self, pattern: str, since: int) -> str:
        """The line, after the first `since`, that the pattern is found in, for which it waits."""
        return until(lambda: next(filter(re.compile(pattern).search, self.lines()[since:]), ""))


def rest(connection: socket.socket) -> bytes:
    """What comes until the other side closes or resets the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def until(condition: Callable[[], Any]) -> Any:
    """What the condition gives when that is true at last."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers on ports of their own and ends them with the module."""
    servers = []

    def start(*arguments: str | Path, **environment: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "-m", "mlx_lora.serve", "--port", "0", *map(str, arguments)]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env={**os.environ, **environment}
            )
        servers.append(process)
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, log.read_text()
        return Server(process, found[0], log)

    yield start
    for process in servers:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with room for generations that take minutes and, when they are greedy, have no end: the end
    token's logit is 0, and among 258 directions in 32 dimensions there is always one that gives more."""
    copy = tmp_path_factory.mktemp("long") / "tiny"
    shutil.copytree(tiny_model, copy)
    weights = dict(mx.load(str(copy / "model.safetensors")))
    weights["model.embed_tokens.weight"][2] = 0
    mx.save_safetensors(str(copy / "model.safetensors"), weights, {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return copy


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return model.load(Model(path=str(folder)))


@pytest.fixture(scope="module")
def adapters(base: Base, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters in mlx-lm's form that change every answer."""
    folders = {}
    for seed, name in enumerate(["poet", "clerk"]):
        lora.attach(base.model, Lora(rank=4), seed)
        randomize(base.model, seed, 0.5)
        attached = lora.attached(base.model)
        adapter = Adapter(attached.pairs, base=Model(path=str(folder)))
        folders[name] = tmp_path_factory.mktemp(name)
        mlx_form.save(folders[name], adapter.arrays(), mlx_form.settings(adapter), {})
        lora.detach(base.model)
    return folders


@pytest.fixture(scope="module")
def server(launch: Callable[..., Server], adapters: dict[str, Path]) -> Server:
    named = [text for name, path in adapters.items() for text in ("--adapter", f"{name}={path}")]
    return launch(*named, "--max-tokens-limit", str(MOST), "--max-body", str(BODY), "--max-waiting", str(WAITING))


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def alone(base: Base, adapters: dict[str, Path]) -> Callable[..., str]:
    """What a model answers in this process, greedily, with the adapter attached as `generate` does."""

    def answer(name: str, prompt: list[int], max_tokens: int = 24, **options: Any) -> str:
        if name in adapters:
            lora.attach_adapter(base.model, mlx_form.read(adapters[name]))
        try:
            return "".join(generation.stream(base.model, base.tokenizer, prompt, max_tokens, **options))
        finally:
            lora.detach(base.model)

    return answer


NAMES = ["base", "poet", "clerk"]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_models_are_listed(server: Server, client: openai.OpenAI):
    assert [entry.id for entry in client.models.list()] == ["tiny", "poet", "clerk"]
    assert client.models.retrieve("poet").id == "poet"
    assert server.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("name", [*NAMES, "tiny"])
def test_chats_are_answered_as_generate_does(name: str, client: openai.OpenAI, base: Base, alone: Callable[..., str]):
    prompt = generation.prompt_tokens(base.tokenizer, "Where is my parcel?")
    expected = alone(name, prompt)
    whole = client.chat.completions.create(model=name, temperature=0, **CHAT)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 24)
    events = list(
        client.chat.completions.create(
            model=name, temperature=0, stream=True, stream_options={"include_usage": True}, **CHAT
        )
    )
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == expected
    assert sum(bool(event.choices and event.choices[0].delta.content) for event in events) > 3
    assert [event.choices[0].finish_reason for event in events if event.choices][-2:] == [None, "length"]
    assert events[-1].usage == whole.usage
    assert events[0].choices[0].delta.role == "assistant"
    assert len({event.id for event in events}) == 1


def test_adapters_answer_differently(base: Base, alone: Callable[..., str]):
    prompt = generation.prompt_tokens(base.tokenizer, "Where is my parcel?")
    assert len({alone(name, prompt) for name in NAMES}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_completed(name: str, client: openai.OpenAI, base: Base, alone: Callable[..., str]):
    expected = alone(name, generation.prompt_tokens(base.tokenizer, "Once upon", raw=True), max_tokens=20)
    options: dict[str, Any] = {"model": name, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(prompt="Once upon", **options).choices[0]
    assert whole.text == expected
    assert client.completions.create(prompt=["Once upon"], **options).choices[0].text == expected
    events = list(client.completions.create(prompt="Once upon", stream=True, **options))
    assert "".join(event.choices[0].text for event in events) == expected
    assert events[-1].choices[0].finish_reason == whole.finish_reason


def test_omitted_options_are_openais(client: openai.OpenAI):
    greedy = client.completions.create(model="base", prompt="Once upon", temperature=0)
    assert greedy.usage
    assert greedy.usage.completion_tokens == 16
    # temperature 1, with a new seed each time
    sampled = [client.completions.create(model="base", prompt="Once upon").choices[0].text for _ in range(5)]
    assert len(set(sampled)) > 1


def test_a_conversation_is_written_by_the_template(client: openai.OpenAI, base: Base, alone: Callable[..., str]):
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it?"}]},
    ]
    first = client.chat.completions.create(model="poet", messages=messages, max_tokens=8, temperature=0).choices[0]
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is it?"}]
    assert first.message.content == alone("poet", generation.chat_prompt(base.tokenizer, conversation), 8)
    messages += [first.message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="poet", messages=messages, max_tokens=8, temperature=0).choices[0]
    conversation += [{"role": "assistant", "content": first.message.content}, {"role": "user", "content": "And now?"}]
    assert second.message.content == alone("poet", generation.chat_prompt(base.tokenizer, conversation), 8)


def test_a_blend_lies_between(server: Server, client: openai.OpenAI):
    def answer(name: str) -> str | None:
        return client.chat.completions.create(model=name, temperature=0, **CHAT).choices[0].message.content

    assert answer("poet:1+clerk:0.0") == answer("clerk:0+poet:1.0") == answer("poet")
    assert answer("poet:0") == answer("base")
    assert answer("poet:0.5+clerk:0.5") not in {answer(name) for name in NAMES}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_end_the_answer(stream: bool, as_list: bool, client: openai.OpenAI):
    full = client.chat.completions.create(model="poet", temperature=0, **CHAT).choices[0].message.content or ""
    stop = full[9:13]  # several tokens, the first of which must not leak
    cut = full[: full.index(stop)]
    answer: Any = client.chat.completions.create(
        model="poet", temperature=0, stop=[stop, "never"] if as_list else stop, stream=stream, **CHAT
    )
    if stream:
        events = list(answer)
        assert "".join(event.choices[0].delta.content or "" for event in events) == cut
        assert events[-1].choices[0].finish_reason == "stop"
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (cut, "stop")
        assert answer.usage.completion_tokens < 24


def test_an_end_token_ends_the_answer(client: openai.OpenAI, base: Base):
    """Sampled answers of a random model end anywhere."""
    prompt = generation.prompt_tokens(base.tokenizer, "a", raw=True)
    for seed in range(60):
        answer = client.completions.create(model="base", prompt="a", max_tokens=60, seed=seed, temperature=2)
        if answer.choices[0].finish_reason == "stop":
            break
    mx.random.seed(seed)
    sampler = lambda logprobs: mx.random.categorical(logprobs * 0.5)  # noqa: E731
    *_, last = stream_generate(base.model, base.tokenizer, prompt, max_tokens=60, sampler=sampler)
    assert last.finish_reason == "stop"
    assert answer.usage
    assert answer.usage.completion_tokens == last.generation_tokens < 60


def test_a_seed_gives_the_same_answer(client: openai.OpenAI, base: Base, alone: Callable[..., str]):
    def answer(seed: int) -> str | None:
        options: Any = {"temperature": 1.3, "top_p": 0.9, "seed": seed}
        return client.chat.completions.create(model="clerk", **options, **CHAT).choices[0].message.content

    prompt = generation.prompt_tokens(base.tokenizer, "Where is my parcel?")
    assert answer(5) == answer(5) == alone("clerk", prompt, temperature=1.3, top_p=0.9, seed=5)
    assert answer(5) != answer(6)
    assert answer(-5) == answer(-5) != answer(5)


@pytest.mark.parametrize("penalty", [{}, {"frequency_penalty": 0.03}, {"presence_penalty": 2.0}])
def test_penalties_reach_the_answer(penalty: dict[str, float], client: openai.OpenAI, base: Base):
    """Greedy, against a loop that runs the whole model for every token."""
    prompt = generation.prompt_tokens(base.tokenizer, "Where is my parcel?")
    written: list[int] = []
    while len(written) < 24 and not set(written) & base.tokenizer.eos_token_ids:
        logits = np.array(base.model(mx.array([prompt + written]))[0, -1])
        for token in set(written):
            logits[token] -= penalty.get("frequency_penalty", 0) * written.count(token)
            logits[token] -= penalty.get("presence_penalty", 0)
        written.append(int(logits.argmax()))
    options: dict[str, Any] = {"temperature": 0, **penalty, **CHAT}
    answer = client.chat.completions.create(model="base", **options)
    shown = [token for token in written if token not in base.tokenizer.eos_token_ids]
    assert answer.choices[0].message.content == base.tokenizer.decode(shown)


def test_penalties_are_openais():
    job = Job(None, [3, 3, 5], 9, 0.0, 1.0, 0, frequency_penalty=0.5, presence_penalty=0.25, stop=[])
    logits = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    (penalize,) = _penalties(job)
    generated = [1, 5, 5, 5, 7]
    expected = logits.copy()
    for token in range(8):
        count = generated.count(token)
        expected[0, token] -= 0.5 * count + 0.25 * (count > 0)
    np.testing.assert_allclose(
        np.array(penalize(mx.array([3, 3, 5, *generated]), mx.array(logits))), expected, atol=1e-6
    )
    np.testing.assert_array_equal(np.array(penalize(mx.array([3, 3, 5]), mx.array(logits))), logits)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("strings", [["abc"], ["aab", "ab"], ["cab", "bca", "zz"], ["c"], []])
def test_nothing_of_a_stop_string_leaks(strings: list[str], size: int):
    text = "xaaxbcxxaabcabczz"
    for end in range(size, len(text) + size, size):
        found = [text[:end].find(string) for string in strings if string in text[:end]]
        if found:
            break
    expected = text[: min(found)] if found else text
    stops, shown, stopped = StopStrings(strings), "", False
    for start in range(0, len(text), size):
        piece, stopped = stops.add(text[start : start + size])
        shown += piece
        assert expected.startswith(shown)
        if stopped:
            break
    assert shown + ("" if stopped else stops.held) == expected
    assert stopped == bool(found)


def test_requests_at_once_are_answered_as_alone(client: openai.OpenAI, base: Base, alone: Callable[..., str]):
    names = ["poet", "base", "clerk", "poet", "clerk"]
    prompt = generation.prompt_tokens(base.tokenizer, "Where is my parcel?")
    expected = {name: alone(name, prompt, 60) for name in NAMES}

    def answer(name: str) -> str | None:
        options: Any = {**CHAT, "max_tokens": 60, "temperature": 0}
        return client.chat.completions.create(model=name, **options).choices[0].message.content

    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(answer, names)) == [expected[name] for name in names]


# ---- refusals --------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "base", **CHAT, **changes}


def said(**message: Any) -> dict[str, Any]:
    return chat(messages=[message])


BAD_CHATS: dict[str, tuple[Any, int, str]] = {
    "not an object": ([1], 400, "valid dictionary|object"),
    "no model": ({key: value for key, value in chat().items() if key != "model"}, 400, "model: is missing"),
    "unknown model": (chat(model="none"), 404, "no model 'none'; there are: tiny, poet, clerk"),
    "unknown part of a blend": (chat(model="poet:1+none:1"), 404, "no model"),
    "twice in a blend": (chat(model="poet:1+poet:1"), 404, "no model"),
    "weight that is no number": (chat(model="poet:nan"), 404, "no model"),
    "model of another type": (chat(model=3), 400, "model: .*string"),
    "no messages": (chat(messages=[]), 400, "messages: .*at least 1"),
    "too many messages": (chat(messages=[{"role": "user", "content": ""}] * 1001), 413, "larger than"),
    "messages of another type": (chat(messages="hello"), 400, "messages: .*array"),
    "unknown role": (said(role="wizard", content="x"), 400, "messages.0.role"),
    "no content": (said(role="user"), 400, "neither content nor tool_calls"),
    "content of another type": (said(role="user", content=3), 400, "messages.0.content"),
    "an image": (said(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]), 400, "'text'"),
    "lone surrogate": (said(role="user", content="\ud800"), 400, "JSON"),
    "unknown field of a message": (said(role="user", content="x", name="me"), 400, "messages.0.name: is not supported"),
    "tools that the template leaves out": (chat(tools=[TOOL]), 400, "leaves out tools"),
    "tool calls that the template leaves out": (
        chat(messages=[*CHAT["messages"], {"role": "assistant", "tool_calls": [CALL]}]),
        400,
        "leaves out tool_calls",
    ),
    "tool call whose arguments are no JSON": (
        said(role="assistant", tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]),
        400,
        "arguments: Invalid JSON",
    ),
    "tool choice": (chat(tool_choice="required"), 400, "tool_choice: .*'auto'"),
    "two answers": (chat(n=2), 400, "n: .*1"),
    "logprobs": (chat(logprobs=True), 400, "logprobs"),
    "top_logprobs": (chat(top_logprobs=3), 400, "top_logprobs"),
    "logit_bias": (chat(logit_bias={"5": 1}), 400, "logit_bias"),
    "JSON mode": (chat(response_format={"type": "json_object"}), 400, "response_format.type: .*'text'"),
    "unknown option": (chat(top_k=5), 400, "top_k: is not supported"),
    "negative temperature": (chat(temperature=-1), 400, "temperature: .*greater"),
    "temperature that is text": (chat(temperature="hot"), 400, "temperature: .*number"),
    "top_p of zero": (chat(top_p=0), 400, "top_p: .*greater"),
    "no tokens": (chat(max_tokens=0), 400, "max_tokens: .*greater"),
    "half a token": (chat(max_tokens=1.5), 400, "max_tokens: .*integer"),
    "two limits": (chat(max_completion_tokens=3), 400, "not both"),
    "more tokens than allowed": (chat(max_tokens=MOST + 1), 400, f"{MOST + 1} is more than the {MOST}"),
    "more tokens than the context": (
        chat(max_tokens=CONTEXT),
        400,
        f"context is {CONTEXT} tokens: the prompt has \\d+",
    ),
    "five stop strings": (chat(stop=list("abcde")), 400, "stop: .*at most 4"),
    "empty stop string": (chat(stop=""), 400, "stop.0: .*at least 1"),
    "large seed": (chat(seed=2**63), 400, "seed"),
    "penalty": (chat(presence_penalty=3), 400, "presence_penalty: .*less"),
    "options of a stream without one": (chat(stream_options={"include_usage": True}), 400, "stream_options"),
    "stream that is no truth value": (chat(stream="yes"), 400, "stream: .*boolean"),
}
BAD_TEXTS: dict[str, tuple[Any, int, str]] = {
    "no prompt": ({"model": "base"}, 400, "prompt: is missing"),
    "empty prompt": ({"model": "base", "prompt": ""}, 400, "the prompt is empty"),
    "two prompts": ({"model": "base", "prompt": ["a", "b"]}, 400, "prompt: .*at most 1"),
    "tokens": ({"model": "base", "prompt": [1, 2]}, 400, "prompt"),
    "echo": ({"model": "base", "prompt": "a", "echo": True}, 400, "echo"),
    "suffix": ({"model": "base", "prompt": "a", "suffix": "b"}, 400, "suffix"),
    "messages": ({"model": "base", "prompt": "a", "messages": []}, 400, "messages: is not supported"),
}
BAD = [("/chat/completions", *case) for case in BAD_CHATS.items()] + [("/completions", *c) for c in BAD_TEXTS.items()]


@pytest.mark.parametrize(("path", "case"), [pytest.param(p, c, id=name) for p, name, c in BAD])
def test_wrong_requests_are_refused(path: str, case: tuple[Any, int, str], server: Server):
    body, status, reason = case
    answer = server.post(f"/v1{path}", body)
    assert answer.status == status, answer.text
    error = answer.json()["error"]
    assert re.search(reason, error["message"]), error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_the_client_sees_its_own_kinds_of_error(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", **CHAT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="context is") as long:
        client.completions.create(model="base", prompt="a" * 100, max_tokens=CONTEXT)
    assert long.value.code == "context_length_exceeded"


def test_what_does_not_bear_on_the_answer_is_accepted(client: openai.OpenAI):
    options: dict[str, Any] = {**CHAT, "model": "base", "temperature": 0}
    plain = client.chat.completions.create(**options)
    off: dict[str, Any] = {"n": 1, "logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}, "stop": []}
    quiet: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "seed": None, "top_p": 1, "tools": None}
    other = client.chat.completions.create(**options, **off, **quiet)
    assert other.choices[0].message.content == plain.choices[0].message.content


REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
JSON_TYPE = b"Content-Type: application/json\r\n"
HALF = REQUEST + JSON_TYPE + b"Authorization: Bearer secret\r\nContent-Length: 100\r\n\r\n{"
RAW = {
    "no JSON": (REQUEST + JSON_TYPE + b"Content-Length: 5\r\n\r\n{nope", 400, b"not valid JSON"),
    "no body": (REQUEST + JSON_TYPE + b"\r\n", 400, b"not valid JSON"),
    "no UTF-8": (REQUEST + JSON_TYPE + b'Content-Length: 3\r\n\r\n"\xff"', 400, b"not valid JSON"),
    "deep": (REQUEST + JSON_TYPE + b"Content-Length: 9000\r\n\r\n" + b"[" * 9000, 400, b"not valid JSON"),
    "NaN": (
        REQUEST
        + JSON_TYPE
        + b"Content-Length: 55\r\n\r\n"
        + b'{"model":"base","messages":[],"temperature":NaN}'.ljust(55),
        400,
        b"temperature: Input should be a finite number",
    ),
    "form": (REQUEST + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", 415, b"application/json"),
    "large": (REQUEST + JSON_TYPE + b"Content-Length: 20001\r\n\r\n", 413, b"larger than 20000 bytes"),
    "large, sent": (REQUEST + JSON_TYPE + b"Content-Length: 99999\r\n\r\n" + b" " * 99999, 413, b"larger than 20000"),
    "large in chunks": (
        REQUEST
        + JSON_TYPE
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 9
        + b"0\r\n\r\n",
        413,
        b"larger than 20000 bytes",
    ),
    "wrong method": (REQUEST.replace(b"POST", b"GET") + b"\r\n", 405, b"GET /v1/chat/completions"),
    "unknown route": (REQUEST.replace(b"chat", b"cat") + b"\r\n", 404, b"there is no such route"),
    "unknown model": (
        REQUEST.replace(b"POST /v1/chat/completions", b"GET /v1/models/x") + b"\r\n",
        404,
        b"no model 'x'",
    ),
    "foreign host": (REQUEST.replace(b"localhost", b"evil.example:80") + JSON_TYPE + b"\r\n", 403, b"evil.example"),
    "no host": (b"GET /health HTTP/1.0\r\n\r\n", 403, b"does not go by"),
    "garbage": (b"\x00\xff\x16\x03\x01 garbage\r\n\r\n", 400, b"Invalid HTTP"),
    "long header": (REQUEST + b"X: " + b"a" * 40_000, 400, b"Invalid HTTP"),
}


@pytest.mark.parametrize("case", RAW.values(), ids=RAW)
def test_wrong_http_is_refused(case: tuple[bytes, int, bytes], server: Server):
    sent, status, reason = case
    answer = server.raw(sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert reason in answer
    assert b"access-control-allow-origin" not in answer.lower()
    assert server.get("/v1/models").status == 200


def test_bytes_at_random_do_not_harm(server: Server, client: openai.OpenAI):
    random = np.random.default_rng(0)
    start = REQUEST + JSON_TYPE + b"Content-Length: 60\r\n\r\n" + json.dumps(chat(max_tokens=1)).encode()[:60]
    for _ in range(60):
        noisy = bytearray(start)
        for place in random.integers(0, len(noisy), 3):
            noisy[place] = random.integers(0, 256)
        with server.connect(bytes(noisy)) as connection:
            with contextlib.suppress(OSError):  # it may be closed already
                connection.shutdown(socket.SHUT_WR)
            assert not rest(connection).startswith(b"HTTP/1.1 5")
    assert client.completions.create(model="base", prompt="a", max_tokens=3).usage
    assert not any("Traceback" in line for line in server.lines())


def test_a_body_that_goes_wrong_after_its_answer_does_no_harm(server: Server):
    start = (
        HALF.replace(b"Connection: close\r\n", b"")
        .replace(b"Content-Length: 100", b"Transfer-Encoding: chunked")
        .replace(b"application/json", b"text/plain")
    )
    with server.connect(start.removesuffix(b"{")) as connection:
        assert connection.recv(13) == b"HTTP/1.1 415 "
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"no size\r\n")
        rest(connection)
    assert is_free(server)
    assert not any("Traceback" in line for line in server.lines())


@pytest.mark.slow
def test_unfinished_headers_have_their_time(server: Server):
    started = time.monotonic()
    with server.connect() as silent, server.connect(b"GET /health HTTP/1.1\r\n") as slow:
        time.sleep(3)
        with contextlib.suppress(ConnectionError):
            slow.sendall(b"Host: localhost\r\n")
        assert rest(silent) == rest(slow) == b""
    assert time.monotonic() - started > 8


def test_too_many_requests_are_refused_and_too_many_connections_cut_off(server: Server):
    started = len(server.lines())
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as halves:

        def answer() -> http.client.HTTPResponse | None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            opened.callback(connection.close)
            try:
                connection.request("GET", "/v1/models")
                return connection.getresponse()
            except ConnectionError:
                return None

        for _ in range(app.REQUESTS):
            halves.enter_context(server.connect(HALF))
        refused = until(lambda: (given := answer()) and given.status == 503 and given)
        assert refused.headers["retry-after"] == "1"
        assert json.load(refused)["error"]["code"] == "overloaded"
        server.logs(r"GET /v1/models 503 ", started)
        until(lambda: not answer())
        halves.close()
        until(lambda: (given := answer()) and given.status == 200)
    assert is_free(server)
    assert not any("Traceback" in line for line in server.lines())


def test_a_thousand_connections_do_not_keep_an_honest_client_out(server: Server):
    """Whole requests, halves, garbage, and nothing at all, from connections that stay; the client asks until it is
    answered, which takes no longer than unfinished headers are given."""
    texts = [HALF, b"", b"\x16\x03\x01garbage\r\n\r\n", REQUEST + JSON_TYPE + b"Content-Length: 20000\r\n\r\n{"]
    started = time.monotonic()
    with contextlib.ExitStack() as opened:
        for number in range(1000):
            with contextlib.suppress(ConnectionError):
                opened.enter_context(server.connect(texts[number % len(texts)]))
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=100, timeout=60) as honest:
            answer = honest.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "?"}], max_tokens=2
            )
        assert answer.usage.completion_tokens <= 2
        assert time.monotonic() - started < app.BODY_SECONDS + app.HEADER_SECONDS
    assert is_free(server)
    assert not any("Traceback" in line for line in server.lines())


def test_a_reader_that_stops_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    """And one that goes on reading is not."""
    monkeypatch.setattr(app, "READ_SECONDS", 3)

    async def pour(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4194304")]})
        for place in range(64):
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": place < 63})

    async def ask(listener: socket.socket) -> list[int]:
        config = uvicorn.Config(pour, http=app._Connection, lifespan="off", log_config=None, timeout_keep_alive=60)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        reader, writer = await asyncio.open_connection(sock=client, limit=4096)
        sizes = []
        for wait in (3.5, 0):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            if wait:
                sizes.append(len(await reader.readexactly(4194304)))
                await asyncio.sleep(wait)
        while server.server_state.connections:
            await asyncio.sleep(0.1)
        server.should_exit = True
        await serving
        writer.close()
        return sizes

    listener = app.listen("127.0.0.1", 0)
    assert asyncio.run(asyncio.wait_for(ask(listener), 60)) == [4194304]


# ---- a model that is busy --------------------------------------------------------------------------------------------


def is_free(server: Server) -> bool:
    """Whether a short request is answered before the client's patience ends."""
    return server.post("/v1/completions", {"model": "clerk", "prompt": "a", "max_tokens": 2}).status == 200


def open_request(server: Server, body: Any) -> socket.socket:
    data = json.dumps(body).encode()
    return server.connect(REQUEST + JSON_TYPE + b"Content-Length: %d\r\n\r\n" % len(data) + data)


def test_a_client_that_leaves_a_stream_frees_the_model(server: Server, client: openai.OpenAI):
    started = len(server.lines())
    with client.chat.completions.create(stream=True, **LONG) as events:
        for _ in zip(range(5), events, strict=False):
            pass
    assert is_free(server)
    line = server.logs(r" 200 model=poet ", started)
    assert 5 <= int(re.findall(r"generated=(\d+) ", line)[0]) < LONG["max_tokens"]


def test_a_client_that_leaves_without_a_stream_frees_the_model(server: Server):
    for patience in (0.5, 2, 8, 30):  # nothing shows that the generation has begun
        started = len(server.lines())
        with open_request(server, LONG):
            time.sleep(patience)
        line = server.logs(r" gone model=poet ", started)
        assert is_free(server)
        if "prompt=" in line:
            return
    pytest.fail("the generation does not begin")


def test_an_answer_that_nobody_reads_does_not_hold_the_model(folder: Path, adapters: dict[str, Path]):
    async def ask(worker: Worker) -> list[Piece]:
        unread = await worker.start(Job("poet", [1, 2, 3], 40, 0.0, 1.0, 0, 0.0, 0.0, []))
        read = await worker.start(Job("clerk", [1, 2, 3], 5, 0.0, 1.0, 0, 0.0, 0.0, []))
        await anext(read.pieces())
        return [piece async for piece in unread.pieces()]

    with Worker(1) as worker:
        assert worker.load(Model(path=str(folder)), {name: str(path) for name, path in adapters.items()}) == []
        pieces = asyncio.run(asyncio.wait_for(ask(worker), 60))
    assert (pieces[-1].tokens, pieces[-1].finish) == (40, "length")


def test_more_requests_than_places_are_refused_and_leaving_gives_the_place_back(server: Server):
    running = open_request(server, {**LONG, "stream": True})
    assert running.recv(9) == b"HTTP/1.1 "
    waiting = [open_request(server, LONG) for _ in range(WAITING + 1)]
    (refused,), _, _ = select.select(waiting, [], [], 60)
    waiting.remove(refused)
    with refused:
        answer = rest(refused)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer.lower()
    assert b'"code":"overloaded"' in answer
    assert server.get("/v1/models").status == 200
    left = len(server.lines())
    waiting.pop().close()
    server.logs(r" gone model=poet ", left)
    last = open_request(server, {**CHAT, "model": "base"})
    for connection in [running, *waiting]:
        connection.close()
    with last:
        assert rest(last).startswith(b"HTTP/1.1 200 OK")
    assert is_free(server)


def test_every_request_is_logged(server: Server):
    started = len(server.lines())
    server.post("/v1/chat/completions", {**CHAT, "model": "poet", "max_tokens": 3, "seed": 1})
    server.logs(r"^POST /v1/chat/completions 200 model=poet prompt=\d+ generated=[123] \d+\.\d\ds$", started)


# ---- the command -----------------------------------------------------------------------------------------------------


def ends(server: Server, client: openai.OpenAI, number: int) -> int:
    """The exit code after a signal that comes while an answer is being written, whose client hears of it, and another
    request has not arrived."""
    half = server.connect(HALF)
    client.completions.create(model="base", prompt="a", max_tokens=3)  # sampled: more of MLX's streams to put away
    with client.chat.completions.create(stream=True, **{**LONG, "model": "tiny"}) as events:
        while not next(events).choices[0].delta.content:
            pass  # MLX's CPU build ignores SIGINT while it compiles, which it does for the first token
        server.process.send_signal(number)
        with pytest.raises(openai.APIError, match="stopping"):
            list(events)
    with half:
        assert rest(half) == b""
    code = server.process.wait(60)
    assert not any("Traceback" in line for line in server.lines())
    return code


def test_a_key_is_asked_for_and_sigterm_ends_the_server(launch: Callable[..., Server], folder: Path):
    server = launch("--model", folder, "--max-tokens-limit", MOST, MLX_LORA_API_KEY="secret")
    assert server.get("/health").status == 200
    for key in ("wrong", "secretly", "sécret"):
        refused = server.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    client = server.client("secret")
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    assert ends(server, client, signal.SIGTERM) == 143


def test_other_addresses_are_warned_of_and_ctrl_c_ends_the_server(launch: Callable[..., Server], folder: Path):
    server = launch("--model", folder, "--max-tokens-limit", MOST, "--host", "0.0.0.0")
    assert "warning: whoever reaches 0.0.0.0 can use this server" in server.log.read_text()
    assert server.ask("GET", "/v1/models", headers={"Host": "my.machine"}).status == 200
    assert ends(server, server.client(), signal.SIGINT) == 130


@pytest.mark.parametrize(
    ("host", "name"),
    [("127.0.0.1", "localhost"), ("127.0.0.2", "127.0.0.2"), ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]")],
)
def test_loopback_addresses_go_by_their_names_only(host: str, name: str):
    try:
        listener = app.listen(host, 0)
    except InputError as error:
        pytest.skip(str(error))  # macOS has no 127.0.0.2, some machines no IPv6
    with listener:
        assert name in (app.hosts(listener) or ())


def test_other_addresses_go_by_any_name():
    with app.listen("0.0.0.0", 0) as listener:
        assert app.hosts(listener) is None


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of bad input, after which it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["serve", "--port", "0", *arguments])
    try:
        code: Any = exit_code(serve._main)
    except SystemExit as error:  # from argparse
        code = error.code
    assert code == 2
    return capsys.readouterr().err


def test_a_port_that_is_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
):
    said = complaint(monkeypatch, capsys, "--model", str(folder), "--port", str(server.port))
    assert said == f"error: --host 127.0.0.1 --port {server.port}: Address already in use\n"


WRONG_COMMANDS: dict[str, tuple[list[str], str]] = {
    "nothing to serve": ([], "give --adapter NAME=FOLDER, --model, or both"),
    "no such adapter": (["--adapter", "a=/nowhere"], "/nowhere: holds no adapter"),
    "no name": (["--adapter", "/nowhere"], "is not NAME=FOLDER"),
    "two of a name": (["--adapter", "a=x", "--adapter", "a=y"], "same name"),
    "the base's name": (["--model", "m", "--adapter", "base=x"], "base is the base's name"),
    "a key that no client can send": (["--model", "m", "--api-key", "s\xe9cret"], "printable ASCII"),
    "a key that is no text": (["--model", "m", "--api-key", "\udcff"], "printable ASCII"),
    "no such host": (["--model", "m", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
}


@pytest.mark.parametrize("case", WRONG_COMMANDS.values(), ids=WRONG_COMMANDS)
def test_wrong_commands(
    case: tuple[list[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments, reason = case
    assert reason in complaint(monkeypatch, capsys, *arguments)


def test_adapters_of_several_bases_need_a_choice(adapters: dict[str, Path], tmp_path: Path):
    other = shutil.copytree(adapters["clerk"], tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"model": "another"}))
    assert serve._base_of({name: str(path) for name, path in adapters.items()}).path.endswith("tiny")
    with pytest.raises(InputError, match="clerk on another, or they load it differently; give the base"):
        serve._base_of({"poet": str(adapters["poet"]), "clerk": str(other)})


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_the_extra_the_command_says_so(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in [name for name in sys.modules if name.startswith((f"{package}.", "mlx_lora.server"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("mlx_lora.server")
    said = complaint(monkeypatch, capsys, "--model", "m")
    assert said == f'error: the server needs {package}: pip install "mlx-lora[serve]"\n'


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_tools_reach_a_template_that_has_them(base: Base):
    tokenizer = model.load_tokenizer(base.folder, base.config)
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call.function.arguments.city }}{% endfor %};{% endfor %}"
    )
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    request = protocol.parse(protocol.ChatRequest, json.dumps(chat(messages=messages, tools=[TOOL])).encode())
    text = tokenizer.decode(request.tokens(tokenizer))
    assert '"name": "weather"' in text
    assert text.endswith("user:Where is my parcel?;assistant:Oslo;tool:rain;")
