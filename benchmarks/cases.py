"""What the benchmarks train: models (real or random, of real shapes) and rows of known lengths.

Each letter and digit is one token of a random model, so a row of text has exactly the tokens that a case asks for in
any program that reads the model's folder; time does not depend on which tokens they are. Letters follow Zipf's law:
there is something to learn. Lengths are spread evenly on a logarithmic scale, the same ones for every seed.
"""

import json
import shutil
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  (loads OpenBLAS on Linux before MLX is imported)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from mlx_lora import gguf_base
from mlx_lora.data import Example
from mlx_lora.errors import InputError

ROOT = Path(__file__).parents[1]
SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]  # mlx-lm pads with 0, whatever it means
PAD, USER, ASSISTANT, END = range(len(SPECIAL))
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LETTERS = string.ascii_letters + string.digits
VOCABULARY = {token: number for number, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Case:
    """A model, rows, and how they are trained: LoRA of rank 8 and alpha 16 on every linear layer of the last `layers`
    blocks, AdamW.

    ``shape`` is a config.json, None means SmolLM2-135M-Instruct itself and the quickstart's chats. Rows are
    ``shortest`` to ``longest`` tokens long; ``supervised`` is the share of a row that is an answer and learned (1: the
    row is plain text and learned whole). ``speed`` and ``memory`` are what has to be reached against mlx-lm, and
    ``checkpointed`` the memory with gradient checkpointing of every block: real tokens per second at least, peak above
    the weights at most.
    """

    name: str
    title: str
    shape: dict[str, Any] | None
    layers: int
    batch_size: int
    rows: int
    longest: int
    shortest: int
    supervised: float = 1.0
    bits: int | None = None
    held_out: int = 8
    epochs: int = 2
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-3
    speed: float | None = None
    memory: float | None = None
    checkpointed: float | None = None


CASES = {
    case.name: case
    for case in (
        Case(
            "a", "SmolLM2-135M, real weights, quickstart's chats, batch 8, prompts masked",
            None, 16, 8, 64, 0, 0, held_out=32, epochs=3, speed=2.0, memory=0.35,
        ),
        Case(
            "b", "Qwen2.5-0.5B's shape, 8 blocks, 32 to 512 tokens, 45 % supervised, batch 4",
            QWEN | {"num_hidden_layers": 8}, 8, 4, 16, 512, 32, 0.45, speed=1.6, memory=0.40,
        ),
        Case(
            "c", "Qwen2.5-0.5B's shape, 8 blocks, 1 x 2,048, all supervised",
            QWEN | {"num_hidden_layers": 8}, 8, 1, 1, 2048, 2048, held_out=1,
            speed=1.05, memory=0.35, checkpointed=0.15,
        ),
        Case(
            "d", "SmolLM2's shape, 6 blocks, 4 bits, 2 x 128, 45 % supervised",
            SMOL | {"num_hidden_layers": 6}, 6, 2, 4, 128, 128, 0.45, bits=4, held_out=2, speed=1.2, memory=0.45,
        ),
        Case(
            "e", "SmolLM2's shape, 8 blocks, 4 x 256, all supervised",
            SMOL | {"num_hidden_layers": 8}, 8, 4, 8, 256, 256, speed=1.0, memory=0.50,
        ),
        Case(
            "long", "Qwen2.5-0.5B's shape, all 24 blocks, 1 x 8,192, all supervised, gradient checkpointing",
            QWEN, 24, 1, 1, 8192, 8192, held_out=0, epochs=1,
        ),
    )
}  # fmt: skip


def tiny(case: Case) -> Case:
    """The case with two narrow blocks, 512 words and an eighth of the length: to see that it runs."""
    shape = (case.shape or SMOL) | TINY
    longest = max((case.longest or 256) // 8, 16)
    shortest = longest if case.shortest == case.longest else 16
    return replace(case, title=f"{case.title} (tiny)", shape=shape, layers=2, longest=longest, shortest=shortest)


def build(shape: dict[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's model of a config.json with random weights in float32, unevaluated."""
    mx.random.seed(seed)
    kind, arguments = mlx_lm.utils._get_classes(shape)
    return kind(arguments.from_dict(shape))


def tokens(case: Case, count: int, seed: int) -> list[tuple[list[int], int]]:
    """`count` rows of a random model's case: (tokens, how many of them come before the answer; 0 in plain text).

    Chats are <user> letters <end> <assistant> letters <end>, text is letters <end>.
    """
    random = np.random.default_rng(seed)
    letters = np.array([VOCABULARY[letter] for letter in LETTERS])
    chances = 1 / np.arange(1, len(letters) + 1)
    rows = []
    for length in _lengths(case, count):
        drawn = random.choice(letters, length, p=chances / chances.sum()).tolist()
        if case.supervised == 1:
            rows.append(([*drawn[: length - 1], END], 0))
            continue
        answer = max(2, round(case.supervised * length))  # its <end> included
        prompt = length - answer
        rows.append(([USER, *drawn[: prompt - 3], END, ASSISTANT, *drawn[prompt - 3 : length - 4], END], prompt))
    return [rows[place] for place in np.random.default_rng(0).permutation(count)]


def _lengths(case: Case, count: int) -> list[int]:
    """From `shortest` to `longest`, evenly spaced on a logarithmic scale, both among them."""
    return [round(length) for length in np.geomspace(case.longest, case.shortest, count)]


def examples(case: Case, count: int | None = None, seed: int = 1) -> list[Example]:
    """A random model's rows as training sees them; `count` is the case's own unless given."""
    made = []
    for place, (row, prompt) in enumerate(tokens(case, count or case.rows, seed)):
        supervised = np.arange(len(row)) >= prompt
        made.append(Example(np.array(row, np.int32), supervised, f"row {place}"))
    return made


def write_rows(case: Case, folder: Path) -> tuple[Path, Path]:
    """Files of the training rows and of the held-out ones, as both programs read them: train.jsonl, held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    if case.shape is None:
        lines = (ROOT / "configs" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
        parts = [lines[: case.rows], lines[len(lines) - case.held_out :]]
    else:
        made = [tokens(case, case.rows, seed=1), tokens(case, case.held_out, seed=2)]
        parts = [[json.dumps(_as_text(row, prompt)) for row, prompt in rows] for rows in made]
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    return files


def _as_text(row: list[int], prompt: int) -> dict[str, Any]:
    letters = {number: letter for letter, number in VOCABULARY.items()}
    words = "".join(letters[token] if token > END else " " for token in row).split()
    if not prompt:
        return {"text": words[0]}
    return {"messages": [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]}


def write_model(case: Case, folder: Path, dtype: str = "float32") -> Path:
    """A folder with the case's model in `dtype`, which mlx-lm and mlx_lora load; returns it.

    Raises InputError where SmolLM2 is needed and not on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if case.shape is None:
        converted = gguf_base.convert(smollm2())
        for file in converted.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        for file in converted.glob("*.safetensors"):
            weights = {name: array.astype(getattr(mx, dtype)) for name, array in mx.load(str(file)).items()}
            mx.save_safetensors(str(folder / file.name), weights, {"format": "mlx"})
        return folder
    network = build(case.shape)
    network.set_dtype(getattr(mx, dtype))
    config = case.shape | {"eos_token_id": END, "dtype": dtype}
    if case.bits:
        nn.quantize(network, 64, case.bits)
        config["quantization"] = {"group_size": 64, "bits": case.bits}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())), {"format": "mlx"})
    _tokenizer().save_pretrained(folder)
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct's GGUF file, where the quickstart put it. Raises InputError that says how to get it."""
    file = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.is_file():
        raise InputError(f"{file} is not there; ./scripts/quickstart.sh fetches it, or leave out case a")
    return file


def _tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; transformers makes the same of it for each kind of model."""
    tokenizer = Tokenizer(BPE(VOCABULARY, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[END], chat_template=TEMPLATE
    )
