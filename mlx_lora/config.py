"""Every option of a run, declared once: its key, type, bounds, default and meaning.

The command line, the reference YAML, the JSON schema and the README's table are all made from these declarations
(see config_file.py).
"""

import os
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)


class Options(BaseModel):
    """A group of options: unknown keys are errors, values are taken as they are written, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


# A path or name; ~ is the home folder.
Name = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00]+$"), AfterValidator(os.path.expanduser)]


class Quantize(Options):
    bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="bits per weight")
    group_size: Literal[32, 64, 128] = Field(64, description="weights that share one scale and bias")


class Model(Options):
    path: Name = Field(description="hub id, local folder, or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="float32 | bfloat16 | float16 | auto: as stored, but float32 on a CPU, and elsewhere bfloat16 "
        "where the base is quantized on load",
    )
    quantize: Quantize | None = Field(None, description="quantize the base on load: {bits, group_size}")
    chat_template: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="in the place of the model's own: a file, or the Jinja text itself"
    )
    template_kwargs: dict[str, JsonValue] = Field(
        {}, description="what the chat template is told besides, such as {enable_thinking: false}"
    )

    @field_validator("template_kwargs")
    @classmethod
    def _names(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in value:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not a name that a template can use")
        return value


# The keys of rows, as data.format describes them.
Column = Literal[
    "messages", "tools", "prompt", "completion", "text", "instruction", "input", "output", "conversations", "system"
]


class Source(Options):
    path: Name = Field(description="as data.train")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often a row is seen in an epoch; 0.5: half of them, always the same"
    )


class Data(Options):
    train: Name | Annotated[list[Name | Source], Field(min_length=1)] = Field(
        description="rows: a file, a folder of files, hub:OWNER/NAME[@CONFIG][:SPLIT], or a list of these, with "
        "weights (times a row is seen in an epoch) if you like: [a.jsonl, {path: b.csv, weight: 0.5}]"
    )
    valid: Name | Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="file, folder or hub:..., or the fraction of train held out by a hash of each row; 0: none"
    )
    format: Literal["auto", "messages", "completion", "text", "alpaca", "sharegpt"] = Field(
        "auto",
        description="what a row holds: messages | completion (prompt, completion) | text | alpaca (instruction, input, "
        "output) | sharegpt (conversations) | auto: seen by its keys, one form in a file",
    )
    columns: dict[Column, str] = Field(
        {}, description="keys or columns of other names: {prompt: question, completion: answer}"
    )
    reasoning: Literal["keep", "drop"] = Field(
        "keep",
        description="an answer's reasoning (reasoning_content, or a think tag): keep (written where the chat template "
        "does) | drop",
    )
    loss_on: Literal["assistant", "last", "completion", "all"] = Field(
        "assistant",
        description="what is learned: assistant (every answer) | last (the last answer) | completion | all tokens",
    )
    max_seq_length: int = Field(2048, ge=2, description="longest row, in tokens")
    on_overflow: Literal["truncate", "split", "drop", "error"] = Field(
        "truncate", description="what happens to longer rows: truncate | split (text only: into pieces) | drop | error"
    )
    packing: bool = Field(
        False, description="lay the rows of a batch end to end, each seeing only itself: for very short rows"
    )

    @property
    def sources(self) -> list[Source]:
        """What `train` names, each with its weight."""
        given = self.train if isinstance(self.train, list) else [self.train]
        return [source if isinstance(source, Source) else Source(path=source) for source in given]

    @property
    def train_paths(self) -> list[str]:
        return [source.path for source in self.sources]

    @property
    def valid_paths(self) -> list[str]:
        """Where validation rows come from."""
        return [self.valid] if isinstance(self.valid, str) else self.train_paths


class Lora(Options):
    rank: int = Field(16, ge=1, le=65536, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the update's input (for embeddings: its output), in training only"
    )
    init: Literal["kaiming_uniform", "gaussian"] = Field(
        "kaiming_uniform",
        description="how lora_a starts: kaiming_uniform (within 1/sqrt(in)) | gaussian (deviation 1/rank)",
    )
    start_from: Name | None = Field(
        None,
        description="adapter (a run, mlx-lm's or PEFT's) that training starts from, of this rank, alpha and modules",
    )
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear, a module's name, a glob on its path, re:REGEX, or a list of these"
    )
    layers: str | list[int] = Field("all", description="blocks that are adapted: all | last:8 | 0-15 | a list")

    @field_validator("target_modules")
    @classmethod
    def _patterns(cls, value: str | list[str]) -> str | list[str]:
        patterns = [value] if isinstance(value, str) else value
        if not patterns or not all(patterns):
            raise ValueError("names at least one module")
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, str) and not re.fullmatch(r"all|last:[1-9]\d*|\d+-\d+", value):
            raise ValueError("is all, last:N, FIRST-LAST or a list of block numbers")
        if isinstance(value, list) and (not value or min(value) < 0):
            raise ValueError("lists block numbers from 0")
        return value


class Schedule(Options):
    name: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="after warmup: constant | linear | cosine"
    )
    warmup: float = Field(
        0.03, ge=0, description="steps in which the rate rises from min_lr; below 1: a share of all steps"
    )
    min_lr: float = Field(1e-6, ge=0, description="rate that warmup starts from and the decay ends at")

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("is a share below 1 or a whole number of steps")
        return value


Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class AdamW(Options):
    name: Literal["adamw"] = Field("adamw", description="adamw | adam | sgd | adafactor | lion")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay, times the learning rate")
    betas: Betas = Field([0.9, 0.999], description="decay of the two running averages")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")


class Adam(Options):
    name: Literal["adam"] = "adam"
    betas: Betas = Field([0.9, 0.999], description="decay of the two running averages")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")


class SGD(Options):
    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last update that is kept")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty added to the gradient")


class Adafactor(Options):
    name: Literal["adafactor"] = "adafactor"
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay, times the learning rate")
    scale_parameter: bool = Field(False, description="multiply the rate by the size of each parameter")


class Lion(Options):
    name: Literal["lion"] = "lion"
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay, times the learning rate")
    betas: Betas = Field([0.9, 0.99], description="decay of the update and of the running average")


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Adam, Tag("adam")]
    | Annotated[SGD, Tag("sgd")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Lion, Tag("lion")],
    Discriminator(_optimizer_name),
]


PLANNED = ("batch_tokens", "loss_chunk", "gradient_checkpointing")  # what train.plan: auto chooses


class Train(Options):
    epochs: int | None = Field(3, ge=1, description="passes over the data; null: until max_steps")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer updates after which the run ends, if not before; null: no limit"
    )
    batch_size: int = Field(4, ge=1, description="rows of about one length that are computed together")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches in an optimizer update")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens in a forward pass, padding counted: larger batches are computed in parts, with the "
        "same result; null: no limit",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    schedule: Schedule = Schedule()
    optimizer: Optimizer = AdamW()
    max_grad_norm: float | None = Field(1.0, gt=0, description="clips the global norm of the gradient; null: never")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")
    gradient_checkpointing: bool | Literal["selective", "mlp"] | Annotated[int, Field(ge=2)] = Field(
        "selective",
        description="recompute in the backward pass what takes memory: false: nothing | selective: what is cheap | "
        "mlp: the MLPs too | a number k: every k-th block too | true: every block",
    )
    loss_chunk: int | None = Field(
        None, ge=1, description="positions whose logits are computed at a time, in parts of the vocabulary; null: 1024"
    )
    prefix_cache: Literal["auto", "memory", "disk", "never"] = Field(
        "auto",
        description="keep what the frozen blocks below the lowest adapted one give: auto (from two epochs on) | memory "
        "| disk | never",
    )
    prefix_cache_limit: float = Field(8.0, gt=0, description="GB that the prefix cache may take")
    memory_limit: float | None = Field(
        None,
        gt=0,
        description="GB of MLX's memory, the base's included, that the run may take: its largest batch is tried first; "
        "null: no limit",
    )
    plan: Literal["manual", "auto"] = Field(
        "manual",
        description="auto: choose batch_tokens, loss_chunk and gradient_checkpointing for the memory there is",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="random seed of the adapter's start, the order of rows and the dropout"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Train":
        if self.epochs is None and self.max_steps is None:
            raise ValueError("train needs epochs or max_steps")
        if self.plan == "auto":
            for name in PLANNED:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"train.plan: auto chooses train.{name} itself; remove one of the two")
        if self.schedule.min_lr > self.learning_rate:
            raise ValueError(
                f"train.schedule.min_lr ({self.schedule.min_lr:g}) is above train.learning_rate "
                f"({self.learning_rate:g}); lower it"
            )
        return self


class Eval(Options):
    every: int = Field(200, ge=1, description="steps between evaluations; also at the start and the end")
    early_stopping: int | None = Field(None, ge=1, description="evaluations without a better loss that end the run")
    samples: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="prompts that base and adapter answer (greedily) at every evaluation"
    )
    sample_tokens: int = Field(256, ge=1, description="most tokens of such an answer")


class Checkpoint(Options):
    every: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="steps between checkpoints; also at the end; auto: after each minute, at most 0.5 % of the time",
    )
    keep: int = Field(3, ge=1, description="newest checkpoints that are kept")


class Log(Options):
    every: int = Field(10, ge=1, description="steps between reports")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="where else reports go: tensorboard and wandb, each an extra of this package"
    )


def _model_mapping(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Config(Options):
    """A whole run."""

    model: Annotated[Model, BeforeValidator(_model_mapping)]
    data: Data
    lora: Lora = Lora()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    output_dir: Name = Field(description="folder of the run")
    notes: dict[str, str] = Field({}, description="free text that is stored with the adapter")

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.data.valid == 0 and self.eval.early_stopping is not None:
            raise ValueError("eval.early_stopping needs validation rows: set data.valid")
        return self


def walk(group: type[Options] = Config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every option as (key path, declared field, group class); the variants of a group follow one another."""
    for name, field in group.model_fields.items():
        groups = [kind for kind in _members(field.annotation) if isinstance(kind, type) and issubclass(kind, Options)]
        if field.default is None and groups:  # an optional group is one option: present or absent
            yield (*prefix, name), field, group
        for kind in groups:
            yield from walk(kind, (*prefix, name))
        if not groups:
            yield (*prefix, name), field, group


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]
