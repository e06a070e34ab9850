"""The bodies of requests and answers, in the form of OpenAI's API.

Nothing is accepted and ignored: a field is used, or does not bear on the answer (`Sampled`'s last ones), or may only
have the value that means "off". Any other is refused with its name.
"""

import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, ValidationError, model_validator

from mlx_lora import chat, generation

Finish = Literal["stop", "length"]


class ApiError(Exception):
    """A refusal: the status of its response and the reason."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Function(Body):
    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: Function


class Tool(Body):
    type: Literal["function"]
    function: dict[str, Any]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(max_length=1000)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    # What the `openai` client adds to an answer that is sent back.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("has neither content nor tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: one text, arguments as an object, and `developer` by its older name."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content or []),
        }
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class TextFormat(Body):
    type: Literal["text"]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampled(Body):
    """What the two kinds of request have in common. Omitted or null means OpenAI's default."""

    model: str = Field(max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=4)
        ]
        | None
    ) = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Off, or refused.
    n: Literal[1] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # No bearing on the answer.
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    service_tier: Any = None

    PREFIX: ClassVar[str]
    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str]

    @model_validator(mode="after")
    def _options_of_streams(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        return self

    def limit(self) -> int | None:
        """Tokens that the answer may have; None: as many as there is room for."""
        return self.max_tokens

    def tokens(self, tokenizer: Any) -> list[int]:
        """The prompt. Raises InputError where it cannot be written."""
        raise NotImplementedError

    def choice(self, text: str, finish: Finish) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def piece(self, text: str | None, finish: Finish | None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        raise NotImplementedError


class ChatRequest(Sampled):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    # Off, or refused.
    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    store: Literal[False] | None = None

    PREFIX, OBJECT, CHUNK = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def tokens(self, tokenizer: Any) -> list[int]:
        messages = [message.for_template() for message in self.messages]
        tools = [tool.model_dump() for tool in self.tools] if self.tools else None
        chat.check_tools(messages, tools, tokenizer, chat.render(messages, tokenizer, tools))
        return generation.chat_prompt(tokenizer, messages, tools)

    def choice(self, text: str, finish: Finish) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}

    def piece(self, text: str | None, finish: Finish | None) -> dict[str, Any]:
        delta = {} if finish else {"role": "assistant", "content": ""} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


class TextRequest(Sampled):
    prompt: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1, max_length=1)]
    # Off, or refused.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    PREFIX, OBJECT, CHUNK = "cmpl-", "text_completion", "text_completion"

    def limit(self) -> int:
        return self.max_tokens or 16

    def tokens(self, tokenizer: Any) -> list[int]:
        return generation.prompt_tokens(tokenizer, self.prompt[0], raw=True)

    def choice(self, text: str, finish: Finish) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def piece(self, text: str | None, finish: Finish | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}


AnyRequest = TypeVar("AnyRequest", bound=Sampled)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """A request's body. Raises ApiError (400) naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = problem["msg"].removeprefix("Value error, ")
    param = ".".join(map(str, problem["loc"])) or None
    if problem["type"] == "json_invalid" and param is None:
        raise ApiError(400, f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    if problem["type"] == "extra_forbidden":
        message = "is not supported"
    elif problem["type"] == "missing":
        message = "is missing"
    raise ApiError(400, f"{param}: {message}" if param else message, param)


def usage(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class Envelope:
    """What the body of an answer, or every event of a stream, has around its choices."""

    def __init__(self, request: Sampled) -> None:
        self._request = request
        self._common = {"id": request.PREFIX + uuid.uuid4().hex, "created": int(time.time()), "model": request.model}
        self._counted = bool(request.stream_options and request.stream_options.include_usage)

    def whole(self, text: str, finish: Finish, prompt: int, generated: int) -> dict[str, Any]:
        choices = [self._request.choice(text, finish)]
        return {**self._common, "object": self._request.OBJECT, "choices": choices, "usage": usage(prompt, generated)}

    def start(self) -> bytes:
        """The event that begins a stream; only chats have one."""
        return self.event(None, None) if isinstance(self._request, ChatRequest) else b""

    def event(self, text: str | None, finish: Finish | None) -> bytes:
        return self._event([self._request.piece(text, finish)], None)

    def end(self, prompt: int, generated: int) -> bytes:
        """The events that end a stream."""
        return (self._event([], usage(prompt, generated)) if self._counted else b"") + b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], counts: dict[str, int] | None) -> bytes:
        extra = {"usage": counts} if self._counted else {}
        return event({**self._common, "object": self._request.CHUNK, "choices": choices, **extra})


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"
