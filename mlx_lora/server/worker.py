"""The thread that owns the model: one request at a time, first come first served, each with its own adapter.

MLX's streams belong to threads, so the thread that loads the model is the one that uses it. A request waits for its
turn on the event loop, where a client that goes away takes its request with it; once it has the turn, its pieces come
from the thread through an `Answer`, and cancelling that ends the generation at its next token.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate

from mlx_lora import generation, model
from mlx_lora.config import Model
from mlx_lora.live import LiveAdapters
from mlx_lora.server.protocol import ApiError, Finish


@dataclass(frozen=True)
class Job:
    """What to generate; `adapter` as `LiveAdapters.use` takes it, the penalties as OpenAI defines them."""

    adapter: Mapping[str, float] | str | None
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    frequency_penalty: float
    presence_penalty: float
    stop: list[str]


@dataclass(frozen=True)
class Piece:
    """Text that was added, the tokens generated up to here, and in the last one why the answer ends."""

    text: str
    tokens: int
    finish: Finish | None


class Answer:
    """The pieces of one answer on their way from the worker's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the generation at its next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, piece: Piece | Exception) -> None:
        """Hands on a piece, or what went wrong; called in the worker's thread."""
        self.call(self._pieces.put_nowait, piece)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the client with it
            self._loop.call_soon_threadsafe(function, *arguments)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece; raises what went wrong."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish:
                return


class Worker:
    """The base and its adapters, loaded, and the requests that wait for them. To be closed in the end."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._stopping = False
        self._mlx = ThreadPoolExecutor(1, "mlx")
        # A tokenizer of its own: transformers' are not to be used by two threads at once.
        self._encoder = ThreadPoolExecutor(1, "tokenizer")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        # A thread's streams that outlive it make MLX's CPU build abort the process when it exits.
        self._mlx.submit(mx.clear_streams)
        self._mlx.shutdown()
        self._encoder.shutdown()

    def load(self, options: Model, adapters: Mapping[str, str]) -> list[str]:
        """Loads the base and the adapters (folders by name); returns what a person should know of these.

        Raises InputError naming what cannot be loaded.
        """
        return self._mlx.submit(self._load, options, adapters).result()

    def _load(self, options: Model, adapters: Mapping[str, str]) -> list[str]:
        base = model.load(options)
        self._base = base
        self._encoding_tokenizer = model.load_tokenizer(base.folder, base.config, options)
        self._adapters = LiveAdapters(base.model, base.identity)
        for name, folder in adapters.items():
            self._adapters.load(name, folder)
        return list(self._adapters.notes.values())

    @property
    def context(self) -> int | None:
        """The tokens that the model has positions for, where its config says so."""
        return generation.context_length(self._base)

    def stop(self) -> None:
        """Ends the running request, and those that wait, with an error."""
        self._stopping = True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A place among the requests that wait. Raises ApiError (503) where all are taken."""
        if self._waiting + self._turn.locked() > self._max_waiting:  # without a running one, the first is the next
            raise ApiError(503, f"{self._waiting} requests are waiting already; try again later", code="overloaded")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def encode(self, tokens: Callable[[Any], list[int]]) -> list[int]:
        """`tokens(tokenizer)`, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, tokens, self._encoding_tokenizer)

    async def start(self, job: Job) -> Answer:
        """Waits for the turn and starts to generate. Whoever has the answer cancels it when it is no longer wanted."""
        await self._turn.acquire()
        answer = Answer()

        def release(_: Future[None]) -> None:
            answer.call(self._turn.release)

        self._mlx.submit(self._generate, job, answer).add_done_callback(release)
        return answer

    def _generate(self, job: Job, answer: Answer) -> None:
        def go_on(*_: object) -> None:
            if answer.cancelled:
                raise _Cancelled
            if self._stopping:
                raise ApiError(503, "the server is stopping", code="stopping")

        try:
            go_on()
            self._adapters.use(job.adapter)
            mx.random.seed(job.seed % 2**64)
            responses = stream_generate(
                self._base.model,
                self._base.tokenizer,
                job.prompt,
                max_tokens=job.max_tokens,
                sampler=generation.sampler(job.temperature, job.top_p),
                logits_processors=_penalties(job),
                prompt_progress_callback=go_on,  # long prompts come in parts
            )
            stops = StopStrings(job.stop)
            with contextlib.closing(responses):
                for response in responses:
                    go_on()
                    text, stopped = stops.add(response.text)
                    finish: Finish | None = "stop" if stopped else response.finish_reason
                    if finish and not stopped:
                        text += stops.held
                    if text or finish:
                        answer.put(Piece(text, response.generation_tokens, finish))
                    if finish:
                        return
        except _Cancelled:
            return
        except Exception as error:  # raised again where the answer is read
            answer.put(error)


class _Cancelled(Exception):
    pass


class StopStrings:
    """Cuts a growing text before the first of some strings; what could be the start of one is held back."""

    def __init__(self, strings: list[str]) -> None:
        self._strings = strings
        self.held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show now, and whether a string has been found."""
        text = self.held + text
        if found := [place for string in self._strings if (place := text.find(string)) >= 0]:
            return text[: min(found)], True
        starts = [string[:size] for string in self._strings for size in range(1, len(string))]
        self.held = max((start for start in starts if text.endswith(start)), key=len, default="")
        return text[: len(text) - len(self.held)], False


def _penalties(job: Job) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """OpenAI's penalties, for mlx-lm's generation: logit - count * frequency - (count > 0) * presence, where count is
    how often the token was generated before. (mlx-lm's own look at the last 20 tokens, the prompt's included.)"""
    if not job.frequency_penalty and not job.presence_penalty:
        return []

    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        generated = tokens[len(job.prompt) :]
        if not generated.size:
            return logits
        counts = mx.zeros(logits.shape[-1]).at[generated].add(1)
        penalty = job.frequency_penalty * counts + job.presence_penalty * (counts > 0)
        return logits - penalty.astype(logits.dtype)

    return [penalize]
