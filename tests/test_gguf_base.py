"""GGUF files as base models, against gguf's own dequantisation, transformers, sentencepiece and llama.cpp."""

# ruff: noqa: RUF001 (characters that look like others are what a tokenizer is tested with)

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from llama_cpp import LlamaCpp
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer, pre_tokenizers

from mlx_lora.errors import InputError
from mlx_lora.files import sha256 as file_sha256
from mlx_lora.gguf_base import convert
from mlx_lora.gguf_base import weights as gguf_weights
from mlx_lora.gguf_base.reader import Metadata, read

TEXTS = [
    "Hello, world!",
    "  two  spaces   three\tand\ttabs \n\n\n new   lines\r\n\r\nwindows \n ",
    "I'm sure we've, they'll, he'd, it's, don't, you're; I'M SURE WE'VE, THEY'LL, HE'D IT'S DON'T YOU'RE 'ſ x'S",
    "1 12 123 1234 12345.678 3,141,592 0x1F 1e-5 ½ ² ٣٤٥ 一二三 Ⅷ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\tif x<=3 and y != 4:\n",
    "naïve café Ångström ß œ Ünïcödé à́ e\u0301 \u00a0nbsp\u2003em\u200bzero\u3000wide\x85nel",
    "日本語のテキスト、中文文本。한국어 텍스트 Русский текст, ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "😀😃 👨‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️ ∑∫√ ≤≥ → ½ €£¥ ©®™",
    "$100 + 50% = #1 @home ^caret ~tilde `tick` | pipe \\ back <tag> [x] {y} (z) “quotes” ‘s — dash…",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|> b <repo_name>c<|im_end|><|im_start|>",
    " ", "\n", "", "   ", "\n\n \n", "a", " a", "a ", "'", "''s", " 's", "don’t", "\x00\x01\x7f", "A1b2C3", "x" * 100,
]  # fmt: skip


# Tiny models, written with gguf's own writer


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From Hugging Face's row order of q_proj and k_proj into llama.cpp's."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "ab", "<|endoftext|>"]
SIZES = {"hidden": 64, "width": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "layers": 2, "vocabulary": len(TOKENS)}


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Metadata:
    return read(smollm2_gguf)[0]


def tiny_weights(
    sizes: dict[str, int] = SIZES,
    architecture: str = "llama",
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names. The biases are those of a Llama: a Qwen has no choice."""
    rng = np.random.default_rng(0)
    hidden, width = sizes["hidden"], sizes["width"]
    queries, keys = sizes["heads"] * sizes["head_dim"], sizes["kv_heads"] * sizes["head_dim"]
    weights: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": rng.normal(0, 1, (sizes["vocabulary"], hidden)),
        "model.norm.weight": 1 + rng.normal(0, 0.1, hidden),
    }
    if not tied:
        weights["lm_head.weight"] = rng.normal(0, 0.3, (sizes["vocabulary"], hidden))
    for layer in range(sizes["layers"]):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
        }  # fmt: skip
        for name, shape in linears.items():
            weights[f"{prefix}.{name}.weight"] = rng.normal(0, 2 / np.sqrt(shape[1]), shape)
            of_qwen2 = architecture == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj")
            if of_qwen2 or (attention_bias if "attn" in name else mlp_bias):
                weights[f"{prefix}.{name}.bias"] = rng.normal(0, 0.5, shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = 1 + rng.normal(0, 0.1, hidden)
        if architecture == "qwen3":
            for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                weights[f"{prefix}.{norm}.weight"] = 1 + rng.normal(0, 0.5, sizes["head_dim"])
    return {name: value.astype(np.float32) for name, value in weights.items()}


GGUF_NAMES = {
    "model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output.",
    "model.layers.": "blk.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def to_gguf(
    weights: dict[str, np.ndarray], sizes: dict[str, int] = SIZES, interleaved: bool = True
) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names; `interleaved`: the rows of q_proj and k_proj in its order for Llamas."""
    tensors = {}
    for name, value in weights.items():
        if interleaved and "q_proj" in name:
            value = permute(value, sizes["heads"])
        if interleaved and "k_proj" in name:
            value = permute(value, sizes["kv_heads"])
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        tensors[name] = value
    return tensors


def byte_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(TOKENS) - 1)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    sizes: dict[str, int] = SIZES,
    change: Callable[[GGUFWriter], None] = lambda writer: None,
    tokenizer: Callable[[GGUFWriter], None] = byte_tokenizer,
    types: dict[str, GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    """Writes a model; ``types`` names the type of the tensors given as raw bytes."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["width"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    if architecture != "qwen2":  # these keys as llama.cpp's converter writes them
        writer.add_key_length(sizes["head_dim"])
        writer.add_value_length(sizes["head_dim"])
    if architecture == "llama":
        writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    tokenizer(writer)
    change(writer)
    for name, value in tensors.items():
        writer.add_tensor(name, value, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray | None] | None = None,
    change: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Writes a tiny model, with `tensors` replaced, added or (None) left out."""
    whole = to_gguf(tiny_weights(architecture=architecture), interleaved=architecture == "llama")
    kept = {name: value for name, value in (whole | (tensors or {})).items() if value is not None}
    return write_gguf(path, kept, change=change, architecture=architecture)


def set_value(key: str, value: Any, kind: gguf.GGUFValueType) -> Callable[[GGUFWriter], None]:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        if value is not None:
            item = None
            if isinstance(value, list):
                item = gguf.GGUFValueType.STRING if isinstance(value[0], str) else gguf.GGUFValueType.INT32
            writer.add_key_value(key, value, kind, sub_type=item)

    return change


def saved(folder: Path) -> dict[str, mx.array]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in mx.load(str(file)).items()}


def mlx_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def torch_logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


# The real model


@pytest.mark.slow
def test_smollm2_gives_the_logits_that_transformers_computes_from_the_same_file(
    smollm2_gguf: Path, smollm2_folder: Path
) -> None:
    tokens = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode("The capital of France is Paris. " * 3)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    expected = torch_logits(reference, tokens.ids)
    actual = mlx_logits(smollm2_folder, tokens.ids)
    print("max", np.abs(actual - expected).max())
    assert np.abs(actual - expected).max() < 1e-3
    assert (actual.argmax(-1) == expected.argmax(-1)).all()
    del reference
    converted = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder)
    assert converted.dtype == torch.float32
    assert np.abs(torch_logits(converted, tokens.ids) - expected).max() < 1e-5


def test_smollm2_gives_the_tokens_of_llama_cpp(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    llama_cpp = LlamaCpp(smollm2_gguf)
    ours = load_tokenizer(smollm2_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    assert isinstance(ours.detokenizer, BPEStreamingDetokenizer)
    assert ours.eos_token_ids == {2}
    assert json.loads((smollm2_folder / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    for text in TEXTS:
        expected = llama_cpp.tokenize(text)
        assert ours.encode(text) == expected, text
        assert theirs.encode(text) == expected, text
        assert ours.decode(expected) == text


def test_smollm2_renders_its_chat_template(smollm2_folder: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for tokenizer in (load_tokenizer(smollm2_folder), transformers.AutoTokenizer.from_pretrained(smollm2_folder)):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered == expected


def smollm2_tokenizer(smollm2: Metadata, pre: str) -> tuple[int, Callable[[GGUFWriter], None]]:
    """A tokenizer of 8000 of SmolLM2's tokens and a few more: how many, and what writes it."""
    tokens = smollm2["tokenizer.ggml.tokens"][:8000]  # in the order of the merges
    # Numbers of several digits, a letter and a sign with half of a combining accent, a word that no merges lead to, and
    # a marker: only what a pre-tokenizer leaves together becomes one of them.
    more = ["12", "123", "eÌ", "!Ì", "xyzzy", "<think>"]

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens + more)
        writer.add_token_types([*smollm2["tokenizer.ggml.token_type"][:8000], *[1] * 5, 4])
        known = set(tokens)
        merges = [merge for merge in smollm2["tokenizer.ggml.merges"][:8000] if merge.replace(" ", "") in known]
        writer.add_token_merges([*merges, "1 2", "12 3", "e Ì", "! Ì"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    return len(tokens + more), write


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "qwen35"])
def test_every_pre_tokenizer_splits_as_llama_cpp_does(smollm2: Metadata, tmp_path: Path, pre: str) -> None:
    vocabulary, tokenizer = smollm2_tokenizer(smollm2, pre)
    sizes = SIZES | {"vocabulary": vocabulary}
    tensors = to_gguf(tiny_weights(sizes, tied=True), sizes)

    def change(writer: GGUFWriter) -> None:
        writer.add_add_eos_token(pre == "qwen2")

    path = write_gguf(tmp_path / "m.gguf", tensors, sizes, change, tokenizer)
    ours, llama_cpp = Tokenizer.from_file(str(convert(path, tmp_path) / "tokenizer.json")), LlamaCpp(path)
    draw = random.Random(0)
    mixtures = ["".join(draw.choices("aeE'sS12!?. \n\r\t\u0301\u094dक中é😀\ufe0f", k=20)) for _ in range(200)]
    for text in [*TEXTS, *mixtures, "xyzzy", "<think>\n\na</think> <think>"]:
        assert ours.encode(text).ids == llama_cpp.tokenize(text), text
        assert ours.encode(text, add_special_tokens=False).ids == llama_cpp.tokenize(text, False), text


def test_a_qwen3_tokenizer_begins_and_ends_as_in_llama_cpp(smollm2: Metadata, tmp_path: Path) -> None:
    vocabulary, tokenizer = smollm2_tokenizer(smollm2, "qwen2")
    sizes = SIZES | {"vocabulary": vocabulary}
    tensors = to_gguf(tiny_weights(sizes, "qwen3", tied=True), sizes, interleaved=False)

    def change(writer: GGUFWriter) -> None:  # as in the files of Qwen3: <|endoftext|> is padding and, unused, bos
        set_value("tokenizer.ggml.bos_token_id", 0, gguf.GGUFValueType.UINT32)(writer)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")

    path = write_gguf(tmp_path / "m.gguf", tensors, sizes, change, tokenizer, architecture="qwen3")
    folder = convert(path, tmp_path)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    llama_cpp = LlamaCpp(path)
    assert ours.eos_token_ids == {llama_cpp.api.llama_vocab_eos(llama_cpp.vocab)} == {2}
    assert theirs.eos_token_id == 2
    assert theirs.pad_token_id == llama_cpp.api.llama_vocab_pad(llama_cpp.vocab) == 0
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) == llama_cpp.tokenize(text), text
        assert ours.decode(ours.encode(text)) == text
    conversation = ours.apply_chat_template([{"content": "Hi"}], tokenize=True, return_dict=False)
    assert conversation == llama_cpp.tokenize("<|im_start|>Hi<|im_end|>")


# Weights


def test_float_types_are_kept_and_make_shards_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny_weights(SIZES)
    tensors, types = to_gguf(weights, SIZES), {}
    for number, (name, value) in enumerate(tensors.items()):
        kind = [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16][number % 3]
        tensors[name] = quantize(value, kind)
        if kind == GGMLQuantizationType.BF16:
            types[name] = kind
    path = write_gguf(tmp_path / "m.gguf", tensors, types=types)
    whole = convert(path, tmp_path / "whole")
    monkeypatch.setattr(gguf_weights, "SHARD_BYTES", 50_000)
    folder = convert(path, tmp_path / "shards")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    dtypes = [mx.float32, mx.float16, mx.bfloat16]
    values = saved(folder)
    assert values.keys() == weights.keys()
    for number, (name, value) in enumerate(weights.items()):
        assert values[name].dtype == dtypes[number % 3]
        assert mx.array_equal(values[name], mx.array(value).astype(dtypes[number % 3])), name
        assert mx.array_equal(values[name], saved(whole)[name])
    tokens = list(range(40))
    assert np.array_equal(mlx_logits(folder, tokens), mlx_logits(whole, tokens))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = values["lm_head.weight"].astype(mx.float32)
    assert np.array_equal(model.get_output_embeddings().weight.detach().numpy(), np.array(head))


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "Q8_0"])
def test_config_names_the_type_of_the_matrices(tmp_path: Path, kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    tensors = {
        name: quantize(value, quantization) if value.ndim == 2 else value
        for name, value in to_gguf(tiny_weights(SIZES), SIZES).items()
    }
    types = {name: quantization for name, value in tensors.items() if value.dtype == np.uint8}
    folder = convert(write_gguf(tmp_path / "m.gguf", tensors, types=types), tmp_path)
    expected = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert json.loads((folder / "config.json").read_text())["dtype"] == expected
    assert transformers.AutoConfig.from_pretrained(folder).dtype == getattr(torch, expected)


DEQUANTIZABLE = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
]  # fmt: skip


def finite_blocks(shape: tuple[int, int], kind: GGMLQuantizationType) -> np.ndarray:
    """Random bytes of a quantised type that dequantise to finite values."""
    rng = np.random.default_rng(0)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    result = np.empty((shape[0] * shape[1] // block_size, block_bytes), np.uint8)
    missing = np.arange(len(result))
    with np.errstate(all="ignore"):
        while len(missing):
            result[missing] = rng.integers(0, 256, (len(missing), block_bytes))
            missing = missing[~np.isfinite(dequantize(result[missing], kind)).all(1)]
    return result.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", DEQUANTIZABLE)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_quantised_types_become_the_float32_values_that_gguf_computes(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    quantization, interleaved = GGMLQuantizationType[kind], architecture == "llama"
    sizes = SIZES | {"hidden": 256, "width": 256, "head_dim": 64, "layers": 1}
    weights, packed = tiny_weights(sizes, architecture), {}
    for name, value in to_gguf(weights, sizes, interleaved).items():
        if value.ndim == 2:
            try:
                packed[name] = quantize(value, quantization)
            except NotImplementedError:
                packed[name] = finite_blocks(value.shape, quantization)
        else:
            packed[name] = value
    types = {name: quantization for name, value in packed.items() if value.dtype == np.uint8}
    assert len(types) == 9
    path = write_gguf(tmp_path / "m.gguf", packed, sizes, types=types, architecture=architecture)
    values = saved(convert(path, tmp_path))
    with np.errstate(all="ignore"):
        expected = {name: dequantize(value, quantization) if name in types else value for name, value in packed.items()}
    actual = to_gguf({name: np.array(value) for name, value in values.items()}, sizes, interleaved)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == np.float32
        assert np.array_equal(actual[name], value), name


# The architecture, against transformers and llama.cpp


def llama3_divisors(factor: float, original: int, head_dim: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight."""
    divisors = []
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (exponent / head_dim)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.5)


def old_linear(writer: GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 2.5)


def default_theta(writer: GGUFWriter) -> None:
    set_value(f"{writer.arch}.rope.freq_base", None, gguf.GGUFValueType.FLOAT32)(writer)


def yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def yarn_betas(writer: GGUFWriter) -> None:
    yarn(writer)
    writer.add_float32(f"{writer.arch}.rope.scaling.yarn_beta_fast", 8.0)
    writer.add_float32(f"{writer.arch}.rope.scaling.yarn_beta_slow", 0.5)


def llama3(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_tensor("rope_freqs.weight", llama3_divisors(8.0, 64, 16, 1000.0))


def llama3_of_llama(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", llama3_divisors(32.0, 8192, 16, 500000.0))
    set_value("llama.rope.freq_base", 500000.0, gguf.GGUFValueType.FLOAT32)(writer)


def no_scaling(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_factor(4.0)
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))


LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WIDE = SIZES | {"head_dim": 32}  # heads that do not make up the hidden size


class Variant(NamedTuple):
    architecture: str = "llama"
    sizes: dict[str, int] = SIZES
    options: dict[str, bool] = {}
    change: Callable[[GGUFWriter], None] = lambda writer: None
    rope: dict[str, Any] = {}


VARIANTS = {
    "plain": Variant(),
    "tied": Variant(options={"tied": True}),
    "wide heads": Variant(sizes=WIDE),
    "biases": Variant(options={"attention_bias": True, "mlp_bias": True}),
    "attention bias": Variant(options={"attention_bias": True}),
    "linear": Variant(change=linear, rope=LINEAR),
    "linear, old key": Variant(change=old_linear, rope=LINEAR),
    "yarn": Variant(change=yarn, rope=YARN),
    "yarn, betas": Variant(change=yarn_betas, rope=YARN | {"beta_fast": 8.0, "beta_slow": 0.5}),
    "llama3": Variant(change=llama3, rope=LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 64}),
    "llama3, 8192": Variant(
        change=llama3_of_llama,
        rope=LLAMA3 | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
    ),
    "none": Variant(change=no_scaling),
    "qwen2": Variant("qwen2"),
    "qwen2, tied": Variant("qwen2", options={"tied": True}),
    "qwen2, default theta": Variant("qwen2", change=default_theta, rope={"rope_theta": 10000.0}),
    "qwen2, linear": Variant("qwen2", change=linear, rope=LINEAR),
    "qwen2, yarn": Variant("qwen2", change=yarn, rope=YARN),
    "qwen3": Variant("qwen3"),
    "qwen3, tied": Variant("qwen3", options={"tied": True}),
    "qwen3, wide heads": Variant("qwen3", WIDE),
    "qwen3, wide heads, tied, yarn": Variant("qwen3", WIDE, {"tied": True}, yarn, YARN),
    "qwen3, default theta": Variant("qwen3", change=default_theta, rope={"rope_theta": 10000.0}),
    "qwen3, linear": Variant("qwen3", change=linear, rope=LINEAR),
    "qwen3, yarn": Variant("qwen3", change=yarn, rope=YARN),
}
LETTERS = random.Random(0).choices(range(256), k=100)


def reference_logits(weights: dict[str, np.ndarray], variant: Variant, rope: dict[str, Any]) -> np.ndarray:
    """What transformers computes from the weights, built without any file."""
    architecture, sizes, options, *_ = variant
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS), "hidden_size": sizes["hidden"], "intermediate_size": sizes["width"],
        "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"], "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"} | rope,
        "tie_word_embeddings": options.get("tied", False),
    }  # fmt: skip
    if architecture == "llama":
        settings |= {name: options.get(name, False) for name in ("attention_bias", "mlp_bias")}
    if architecture != "qwen2":
        settings["head_dim"] = sizes["head_dim"]
    config = transformers.AutoConfig.for_model(architecture, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return torch_logits(model, LETTERS)


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_tiny_model_gives_the_logits_of_transformers_and_llama_cpp(tmp_path: Path, name: str) -> None:
    variant = VARIANTS[name]
    architecture, sizes, options, change, rope = variant
    weights = tiny_weights(sizes, architecture, **options)
    tensors = to_gguf(weights, sizes, interleaved=architecture == "llama")
    path = write_gguf(tmp_path / "m.gguf", tensors, sizes, change, architecture=architecture)
    folder = convert(path, tmp_path)
    expected = reference_logits(weights, variant, rope)
    differences = {"mlx": np.abs(mlx_logits(folder, LETTERS) - expected).max()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    differences["transformers"] = np.abs(torch_logits(model, LETTERS) - expected).max()
    if change is not yarn_betas:  # llama.cpp does not read the betas for this architecture
        differences["llama.cpp"] = np.abs(LlamaCpp(path).logits(LETTERS) - expected).max()
    print(differences)
    assert max(differences.values()) < 5e-4
    if rope:
        unscaled = {"rope_theta": rope["rope_theta"]} if {"rope_theta", "rope_type"} <= rope.keys() else {}
        effect = np.abs(reference_logits(weights, variant, unscaled) - expected).max()
        print("effect", effect)
        assert effect > 0.2


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_rows_in_the_wrong_order_give_other_logits(tmp_path: Path, architecture: str) -> None:
    weights = tiny_weights(architecture=architecture)
    tensors = to_gguf(weights, interleaved=architecture != "llama")
    path = write_gguf(tmp_path / "m.gguf", tensors, architecture=architecture)
    expected = reference_logits(weights, Variant(architecture), {})
    ours, llama_cpp = mlx_logits(convert(path, tmp_path), LETTERS), LlamaCpp(path).logits(LETTERS)
    print(np.abs(ours - expected).max(), np.abs(llama_cpp - expected).max(), np.abs(ours - llama_cpp).max())
    assert np.abs(ours - expected).max() > 0.5
    assert np.abs(llama_cpp - expected).max() > 0.5
    assert np.abs(ours - llama_cpp).max() < 5e-4


# SentencePiece


@pytest.mark.parametrize("space_prefix", [True, False])
def test_a_sentencepiece_tokenizer_gives_the_tokens_of_sentencepiece_and_llama_cpp(
    tmp_path: Path, space_prefix: bool
) -> None:
    import sentencepiece

    corpus = [line for text in (Path(json.__file__).read_text(), *TEXTS) for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=900,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=space_prefix, user_defined_symbols=["<tool>"],
        minloglevel=2,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = range(spm.vocab_size())

    def kind(piece: int) -> int:
        if spm.id_to_piece(piece) == "<tool>":
            return 4
        return 2 if spm.is_unknown(piece) else 3 if spm.is_control(piece) else 6 if spm.is_byte(piece) else 1

    def tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([spm.id_to_piece(piece) for piece in pieces])
        writer.add_token_scores([spm.get_score(piece) for piece in pieces])
        writer.add_token_types([kind(piece) for piece in pieces])
        if not space_prefix:
            writer.add_add_space_prefix(False)
            writer.add_add_eos_token(True)

    sizes = SIZES | {"vocabulary": len(pieces)}
    tensors = to_gguf(tiny_weights(sizes), sizes)
    path = write_gguf(tmp_path / "m.gguf", tensors, sizes, tokenizer=tokenizer)
    folder = convert(path, tmp_path)
    ours, llama_cpp = load_tokenizer(folder), LlamaCpp(path)
    assert isinstance(ours.detokenizer, SPMStreamingDetokenizer)
    assert ours.eos_token_ids == {spm.eos_id()}
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.bos_token_id == spm.bos_id()
    special = ["<s>Hi</s> you", "a<tool>b <tool> c", "<unk> x", "</s>", "<0x0A>"]
    for text in TEXTS + special:
        assert ours.encode(text) == llama_cpp.tokenize(text), text
        assert theirs.encode(text) == llama_cpp.tokenize(text), text
        if "\0" not in text and text not in special:
            ids = ours.encode(text, add_special_tokens=False)
            assert ids == spm.encode(text), text
            assert ours.decode(ids) == text
    assert any(spm.is_byte(piece) for piece in spm.encode(TEXTS[6]))


# Once, and whole


def test_a_second_conversion_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    folder = convert(path)
    assert folder.parent == tmp_path / "cache" / "gguf"
    assert folder.name.startswith(file_sha256(path))
    times = {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]}
    moved = path.rename(tmp_path / "other-name.gguf")
    assert convert(moved) == folder
    assert times == {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]}
    monkeypatch.delenv("MLX_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert convert(moved).parent == tmp_path / "xdg" / "mlx_lora" / "gguf"


CONVERT = """
import sys
from pathlib import Path
import mlx_lora.gguf_base as gguf_base
print("ready", flush=True)
print(gguf_base.convert(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def start_conversion(path: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CONVERT, str(path), str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_conversion_leaves_nothing_half_done(smollm2_gguf: Path, smollm2_folder: Path, tmp_path: Path) -> None:
    for delay in (0, 0.2, 0.5):
        process = start_conversion(smollm2_gguf, tmp_path)
        while not list(tmp_path.glob("*.tmp")):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert {path.suffix for path in tmp_path.iterdir()} == {".tmp", ".lock"}
    folder = convert(smollm2_gguf, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert {file.name: file_sha256(file) for file in folder.iterdir()} == {
        file.name: file_sha256(file) for file in smollm2_folder.iterdir()
    }


def test_two_conversions_at_once_do_no_harm(smollm2_gguf: Path, tmp_path: Path) -> None:
    processes = [start_conversion(smollm2_gguf, tmp_path) for _ in range(2)]
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1
    assert load_model(Path(folders.pop()), lazy=True)


# Refusals

UINT32, INT32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.INT32, gguf.GGUFValueType.STRING
FLOAT32, ARRAY, BOOL = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL

BAD_METADATA = {
    "adapter": ("general.type", "adapter", STRING, "type 'adapter', not a model"),
    "architecture": ("general.architecture", "gpt2", STRING, "'gpt2' is not supported .*: llama, qwen2, qwen3; give"),
    "architecture of a wrong type": ("general.architecture", 7, UINT32, "should be of type str"),
    "split": ("split.count", 3, UINT32, "one part of a split model"),
    "experts": ("llama.expert_count", 8, UINT32, "expert_count = 8 is not supported"),
    "sliding window": ("llama.attention.sliding_window", 64, UINT32, "sliding_window = 64"),
    "no layers key": ("llama.block_count", None, UINT32, "block_count is None"),
    "too many layers": ("llama.block_count", 2**32 - 1, UINT32, "blk.2.attn_q.weight is missing"),
    "too few layers": ("llama.block_count", 1, UINT32, "blk.1.attn_k.weight is not part"),
    "no epsilon": ("llama.attention.layer_norm_rms_epsilon", None, FLOAT32, "rms_epsilon is missing"),
    "zero heads": ("llama.attention.head_count", 0, UINT32, "head_count is 0"),
    "heads by layer": ("llama.attention.head_count", [4, 2], ARRAY, r"head_count is \[4, 2\]"),
    "key heads": ("llama.attention.head_count_kv", 3, UINT32, "4 heads of size 16 with 3 key heads"),
    "partial RoPE": ("llama.rope.dimension_count", 8, UINT32, r"RoPE size of \[8, 16\]"),
    "longrope": ("llama.rope.scaling.type", "longrope", STRING, "RoPE scaling 'longrope'"),
    "RoPE factor of a wrong type": ("llama.rope.scaling.factor", "4", STRING, "factor should be of type float"),
    "attention factor": ("llama.rope.scaling.attn_factor", 0.5, FLOAT32, "attn_factor = 0.5"),
    "width": ("llama.feed_forward_length", 128, UINT32, r"blk.0.ffn_gate.weight has shape \(96, 64\) instead of"),
    "tokenizer": ("tokenizer.ggml.model", "bert", STRING, "tokenizer 'bert' is not supported"),
    "no tokenizer": ("tokenizer.ggml.model", None, STRING, "tokenizer.ggml.model is missing"),
    "pre-tokenizer": ("tokenizer.ggml.pre", "viking", STRING, "pre-tokenizer 'viking'.* supported: default, gpt-2"),
    "no pre-tokenizer": ("tokenizer.ggml.pre", None, STRING, "tokenizer.ggml.pre is missing"),
    "fewer tokens": ("tokenizer.ggml.tokens", TOKENS[:-1], ARRAY, "257 different tokens, .* 258 rows"),
    "the same token twice": ("tokenizer.ggml.tokens", [*TOKENS[:-1], "a"], ARRAY, "257 different tokens"),
    "tokens of a wrong type": ("tokenizer.ggml.tokens", list(range(258)), ARRAY, "list of str values"),
    "fewer token types": ("tokenizer.ggml.token_type", [1, 1], ARRAY, "list of 258 int values"),
    "merges": ("tokenizer.ggml.merges", ["x yz"], ARRAY, "merges do not fit its tokens"),
    "no end": ("tokenizer.ggml.eos_token_id", None, UINT32, "eos_token_id is missing"),
    "end outside": ("tokenizer.ggml.eos_token_id", 258, UINT32, "eos_token_id is 258"),
    "no beginning": ("tokenizer.ggml.add_bos_token", True, BOOL, "bos_token_id is missing"),
    "no scores": ("tokenizer.ggml.model", "llama", STRING, "scores is missing"),
    "template": ("tokenizer.chat_template", 1, UINT32, "chat_template should be of type str"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_METADATA)
def test_unsupported_metadata_is_refused(tmp_path: Path, case: str) -> None:
    key, value, kind, reason = BAD_METADATA[case]
    path = write_tiny(tmp_path / "m.gguf", change=set_value(key, value, kind))
    with pytest.raises(InputError, match=f"m.gguf: .*{reason}") as caught:
        convert(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".lock"}


def with_tensor(name: str, value: np.ndarray | None, architecture: str = "llama") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        changed = value.astype(np.float32) if value is not None and value.dtype != np.int32 else value
        write_tiny(path, architecture, {name: changed})

    return write


def with_bytes(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tiny(path)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return write


def put(position: int, value: int, size: int = 8) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[position : position + size] = value.to_bytes(size, "little")
        return data

    return change


def endless_list(data: bytearray) -> bytes:
    key = b"x" * 8
    return b"GGUF" + b"".join(
        number.to_bytes(size, "little") for number, size in ((3, 4), (0, 8), (1, 8), (8, 8))
    ) + key + (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**60).to_bytes(8, "little")  # fmt: skip


def yarn_attention_factor(path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        yarn(writer)
        writer.add_float32("llama.rope.scaling.yarn_attn_factor", 1.0)

    write_tiny(path, change=change)


def qwen2_with_wide_heads(path: Path) -> None:
    tensors = to_gguf(tiny_weights(WIDE, "qwen2"), interleaved=False)
    write_gguf(path, tensors, change=lambda writer: writer.add_key_length(32), architecture="qwen2")


def tied_scores(path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "ba"]

    def tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)

    sizes = SIZES | {"vocabulary": len(tokens)}
    write_gguf(path, to_gguf(tiny_weights(sizes), sizes), sizes, tokenizer=tokenizer)


BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b"") and None, "not a GGUF file"),
    "magic": (with_bytes(put(0, 0, 4)), "not a GGUF file"),
    "version 1": (with_bytes(put(4, 1, 4)), "version 1 is not supported"),
    "big endian": (with_bytes(put(4, 3 << 24, 4)), "big-endian"),
    "truncated header": (with_bytes(lambda data: data[:500]), "ends too early"),
    "truncated data": (with_bytes(lambda data: data[:-1000]), "ends too early"),
    "absurd number of tensors": (with_bytes(put(8, 2**62)), "header is damaged|ends too early"),
    "absurd number of keys": (with_bytes(put(16, 2**62)), "header is damaged|ends too early"),
    "absurd length of a key": (with_bytes(put(24, 2**62)), "ends too early"),
    "absurd length of a list": (with_bytes(endless_list), "ends too early"),
    "no embedding": (with_tensor("token_embd.weight", None), "token_embd.weight is missing"),
    "missing tensor": (with_tensor("blk.1.ffn_up.weight", None), "blk.1.ffn_up.weight is missing"),
    "bias in one place": (with_tensor("blk.0.attn_q.bias", np.zeros(64)), "attn_k.bias is missing"),
    "unknown tensor": (with_tensor("blk.0.attn_q_norm.weight", np.ones(16)), "attn_q_norm.weight is not part"),
    "integer tensor": (with_tensor("output_norm.weight", np.ones(64, np.int32)), "unsupported type I32"),
    "3-D tensor": (with_tensor("blk.0.x", np.ones((2, 2, 2))), "blk.0.x is not part of a supported llama"),
    "5-D tensor": (with_tensor("blk.0.x", np.ones((2, 2, 2, 2, 2))), "unsupported shape"),
    "not finite": (with_tensor("output_norm.weight", np.full(64, np.nan)), "not finite"),
    "other RoPE divisors": (with_tensor("rope_freqs.weight", np.arange(1, 9)), "RoPE scaling of Llama 3"),
    "too many RoPE divisors": (with_tensor("rope_freqs.weight", np.ones(9)), "RoPE scaling of Llama 3"),
    "YaRN attention factor": (yarn_attention_factor, "yarn_attn_factor other than 1.138629"),
    "qwen2moe": (with_tensor("blk.0.ffn_up_exps.weight", np.ones((4, 8, 8)), "qwen2moe"), "'qwen2moe' is not"),
    "qwen3moe": (with_tensor("blk.0.ffn_up_exps.weight", np.ones((4, 8, 8)), "qwen3moe"), "'qwen3moe' is not"),
    "qwen2 without a bias": (with_tensor("blk.1.attn_k.bias", None, "qwen2"), "attn_k.bias is missing"),
    "qwen2 with a longer bias": (with_tensor("blk.0.attn_v.bias", np.ones(64), "qwen2"), r"\(64,\) instead of \(32,\)"),
    "qwen2 with another bias": (with_tensor("blk.0.attn_output.bias", np.ones(64), "qwen2"), "output.bias is not part"),
    "qwen2 with a norm": (with_tensor("blk.0.attn_q_norm.weight", np.ones(16), "qwen2"), "q_norm.weight is not part"),
    "qwen2 with wide heads": (qwen2_with_wide_heads, "4 heads of size 32 do not make up the hidden size 64"),
    "qwen3 without a norm": (with_tensor("blk.1.attn_q_norm.weight", None, "qwen3"), "attn_q_norm.weight is missing"),
    "qwen3 with a longer norm": (with_tensor("blk.0.attn_k_norm.weight", np.ones(64), "qwen3"), r"instead of \(16,\)"),
    "qwen3 with a bias": (with_tensor("blk.0.attn_q.bias", np.ones(64), "qwen3"), "attn_q.bias is not part"),
    "qwen3 with RoPE divisors": (with_tensor("rope_freqs.weight", np.ones(8), "qwen3"), "rope_freqs.* is not part"),
    "the same score twice": (tied_scores, "token 'ba' has the same score"),
    "no file": (lambda path: None, "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    write, reason = BAD_FILES[case]
    path = tmp_path / "m.gguf"
    write(path)
    with pytest.raises(InputError, match=f"m.gguf: .*({reason})"):
        convert(path, tmp_path / "cache")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_damaged_file_is_refused_or_converted_but_never_crashes(tmp_path: Path, architecture: str) -> None:
    whole = write_tiny(tmp_path / "good.gguf", architecture).read_bytes()
    header = len(whole) - sum(value.nbytes for value in tiny_weights(architecture=architecture).values())
    generator = random.Random(0)
    refused = 0
    for number in range(150):
        data = bytearray(whole)
        if number % 3:
            for _ in range(generator.randint(1, 4)):
                data[generator.randrange(header)] = generator.randrange(256)
        else:
            del data[generator.randrange(len(data)) :]
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        try:
            convert(path, tmp_path / "cache")
        except InputError:
            refused += 1
    assert refused > 75


def test_a_cache_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"m\.gguf: .*MLX_LORA_CACHE"):
        convert(path, tmp_path / "file" / "cache")
