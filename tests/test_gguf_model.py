"""Whole models as GGUF files: run by llama.cpp itself, and read back."""

# ruff: noqa: RUF001 (characters that look like others are what a tokenizer is tested with)

import json
import resource
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from llama_cpp import LlamaCpp
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_gguf_base import SIZES, TEXTS, tiny_weights, to_gguf, write_gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlx_lora import gguf_base, gguf_layout, gguf_model, gguf_vocab, lora, model
from mlx_lora.config import Lora, Model, Quantize
from mlx_lora.errors import InputError
from mlx_lora.model import Base

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# As the tokenizer.json files of Qwen2 to Qwen3 and of Llama 3 have them.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(form: str) -> Tokenizer:
    """A small byte-level BPE whose parts are those of a real tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=form == "llama3"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {
        "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), whole]),
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), whole]),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words]),
        "gpt2": by_words,
    }[form]
    if form == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(json.__file__).read_text(), *TEXTS, " 123456 2024" * 50], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if form == "llama3":
        bos = (SPECIAL[1], tokenizer.token_to_id(SPECIAL[1]))
        template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    elif form == "qwen":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {form: byte_level(form) for form in ("qwen", "llama3", "smollm", "gpt2")}


SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "head_dim": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 1000.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama3", {}),
    "llama, tied": ("llama", "smollm", {"tie_word_embeddings": True}),
    "llama, biases, large heads": ("llama", "gpt2", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama, one key head of size 6": ("llama", "gpt2", {"num_key_value_heads": 1, "head_dim": 6}),
    "llama, linear": ("llama", "gpt2", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e3}}),
    "llama, yarn": ("llama", "gpt2", {"rope_parameters": YARN}),
    "llama, llama3": ("llama", "llama3", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", "gpt2", {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen", {}),
    "qwen2, tied": ("qwen2", "qwen", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen", {"head_dim": 32}),
    "qwen3, tied, yarn": ("qwen3", "qwen", {"tie_word_embeddings": True, "rope_parameters": YARN}),
}  # fmt: skip


def save_model(
    folder: Path,
    kind: str,
    tokenizer: Tokenizer,
    changes: dict[str, Any],
    special: tuple[str, str, str] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
) -> Path:
    """A random model as transformers saves it; its embedding has 7 rows more than the tokenizer has tokens."""
    bos, eos, pad = special
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=TEMPLATE
    ).save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": tokenizer.token_to_id(eos)}
    shape = SHAPE | {"vocab_size": tokenizer.get_vocab_size() + 7, "tie_word_embeddings": False} | ends
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape | changes))
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim == 2:
                value.normal_(0, 0.3 if "embed_tokens" in name else 1.2 * value.shape[1] ** -0.5)
            else:
                value.copy_(torch.randn_like(value) * 0.3 + ("norm" in name))
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Tokenizer]) -> Callable[[str], Path]:
    """The folder of one of MODELS, made when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name.replace(", ", "-").replace(" ", "-")
        if not path.exists():
            kind, form, changes = MODELS[name]
            save_model(path, kind, tokenizers[form], changes)
        return path

    return folder


def load(path: Path, targets: str | list[str] = "re:.*(proj|embed_tokens|lm_head)", **options: Any) -> Base:
    """A base with an adapter on every matrix that changes its output a lot."""
    base = model.load(Model(path=str(path), **options))
    if targets:
        lora.attach(base.model, Lora(target_modules=targets, rank=4, alpha=8.0))
        tiny.randomize(base.model, size=0.2)
    return base


def logits(base: Base, tokens: list[int]) -> np.ndarray:
    return tiny.float64(base.model(mx.array([tokens]))[0])


def difference(path: Path, expected: np.ndarray, tokens: list[int]) -> float:
    return float(np.abs(LlamaCpp(path).logits(tokens) - expected).max())


TOKENS = np.random.default_rng(0).integers(0, 800, 100).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_mlx_does(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base = load(folders(name))
    expected = logits(base, TOKENS)
    path = tmp_path / "model.gguf"
    assert gguf_model.write(path, base, None, "f32") == []
    actual = difference(path, expected, TOKENS)
    lora.disable(base.model)
    effect = np.abs(expected - logits(base, TOKENS)).max()
    print(f"difference {actual:.1e}, effect of the adapter {effect:.2f}")
    assert actual < 1e-4
    assert effect > 1
    # and back: the file is itself a base
    again = model.load(Model(path=str(gguf_base.convert(path, tmp_path))))
    assert np.abs(logits(again, TOKENS) - expected).max() < 1e-4


@pytest.mark.parametrize(("dtype", "limit"), [("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.8)])
def test_smaller_types_come_close(folders: Callable[[str], Path], tmp_path: Path, dtype: Any, limit: float) -> None:
    base = load(folders("qwen3"))
    expected = logits(base, TOKENS)
    whole, path = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    gguf_model.write(whole, base, None, "f32")
    assert gguf_model.write(path, base, None, dtype) == []
    actual = difference(path, expected, TOKENS)
    print(f"{dtype}: difference {actual:.3f}, size {path.stat().st_size / whole.stat().st_size:.2f}")
    assert actual < limit
    original = {tensor.name: tensor.data for tensor in GGUFReader(whole).tensors}
    for tensor in GGUFReader(path).tensors:
        exact = original[tensor.name].reshape(-1, 16)
        if original[tensor.name].ndim == 1:
            assert tensor.tensor_type.name == "F32"
            assert np.array_equal(tensor.data.reshape(-1, 16), exact)
            continue
        assert tensor.tensor_type.name == dtype.upper()
        error = np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(-1, 16) - exact)
        if dtype == "q8_0":  # half a step of the block's scale, which is itself an F16
            blocks = np.abs(exact.reshape(-1, 32)).max(1, keepdims=True)
            assert (error.reshape(-1, 32) <= blocks * (0.5 / 127 + 2**-11)).all()
        else:
            assert (error <= np.abs(exact) * {"f16": 2**-11, "bf16": 2**-8}[dtype] + 2**-25).all()


def test_rows_that_q8_0_cannot_hold_are_f16(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    folder = save_model(tmp_path / "folder", "llama", tokenizers["gpt2"], {"intermediate_size": 80})
    base = load(folder)
    path = tmp_path / "model.gguf"
    notes = gguf_model.write(path, base, None, "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert {name for name, kind in types.items() if kind == "F16"} == {f"blk.{n}.ffn_down.weight" for n in (0, 1)}
    assert notes == ["2 matrices are F16, since Q8_0 needs rows of a multiple of 32 numbers"]
    assert difference(path, logits(base, TOKENS), TOKENS) < 0.8


def test_a_base_quantized_on_load_is_written_as_it_computes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    base = load(folders("qwen2"), "all-linear", quantize=Quantize(bits=4, group_size=32))
    path = tmp_path / "model.gguf"
    gguf_model.write(path, base, None, "f32")
    assert difference(path, logits(base, TOKENS), TOKENS) < 1e-4


@pytest.mark.parametrize("wrong", ["rows not interleaved", "adapter left out"])
def test_what_is_wrong_shows(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    base = load(folders("llama"))
    expected = logits(base, TOKENS)
    if wrong == "adapter left out":
        lora.detach(base.model)
    else:
        monkeypatch.setattr(gguf_layout, "interleave", lambda rows, head_dim: rows)
    path = tmp_path / "model.gguf"
    gguf_model.write(path, base, None, "f32")
    assert difference(path, expected, TOKENS) > 1


# The tokenizer and the rest of the metadata

FORMS = {"llama": "llama-bpe", "llama, tied": "smollm", "mistral": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}


@pytest.mark.parametrize("name", FORMS)
def test_llama_cpp_gives_the_tokens_of_the_tokenizer(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base = load(folders(name), [])
    path = tmp_path / "model.gguf"
    gguf_model.write(path, base, None, "f16")
    llama_cpp = LlamaCpp(path)
    form = FORMS[name]
    texts = [*TEXTS, "a<tool_call>b<|im_end|> <|im_start|>", "12345 67890 x1y22z333"]
    if form in ("qwen2", "llama-bpe"):
        texts = [text.replace("'ſ", "") for text in texts]  # 's with a long s, which llama.cpp does not know
    if form == "qwen2":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text in texts:
        assert llama_cpp.tokenize(text) == base.tokenizer.encode(text), text
        assert llama_cpp.tokenize(text, False) == base.tokenizer.encode(text, add_special_tokens=False), text
    fields = GGUFReader(path).fields
    value = {key: field.contents() for key, field in fields.items()}
    assert value["tokenizer.ggml.pre"] == form
    assert value["tokenizer.ggml.add_bos_token"] is (form == "llama-bpe")
    assert value["tokenizer.chat_template"] == base.tokenizer.chat_template == TEMPLATE
    tokens = value["tokenizer.ggml.tokens"]
    assert tokens[-7:] == [f"[PAD{number}]" for number in range(len(tokens) - 7, len(tokens))]
    assert value["tokenizer.ggml.token_type"][-12:] == [1, 3, 3, 3, 4, *[5] * 7]
    ids = {role: tokens[value[f"tokenizer.ggml.{role}_token_id"]] for role in ("bos", "eos", "padding")}
    assert ids == {"bos": SPECIAL[1], "eos": SPECIAL[2], "padding": SPECIAL[0]}


def test_the_keys_have_the_types_that_llama_cpp_writes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_model.write(path, load(folders("llama, llama3"), []), None, "q8_0")
    fields = GGUFReader(path).fields
    types = {key: [kind.name for kind in field.types] for key, field in fields.items() if not key.startswith("GGUF.")}
    strings = ("general.architecture", "general.type", "general.name", "tokenizer.chat_template")
    strings += ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    floats = ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
    assert types == {key: ["UINT32"] for key in types} | {key: ["STRING"] for key in strings} | {
        key: ["FLOAT32"] for key in floats
    } | {f"tokenizer.ggml.{key}": ["ARRAY", "STRING"] for key in ("tokens", "merges")} | {
        "tokenizer.ggml.token_type": ["ARRAY", "INT32"],
        "tokenizer.ggml.add_bos_token": ["BOOL"],
        "tokenizer.ggml.add_eos_token": ["BOOL"],
    }  # fmt: skip
    assert fields["general.name"].contents() == "llama-llama3"
    assert fields["general.file_type"].contents() == 7
    assert fields["general.quantization_version"].contents() == 2
    assert fields["llama.rope.freq_base"].contents() == 1000.0


def test_every_token_that_ends_an_answer_and_every_template_is_kept(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    folder = save_model(tmp_path / "folder", "llama", tokenizers["gpt2"], {})
    ends = [tokenizers["gpt2"].token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    base = load(folder, [])
    gguf_model.write(tmp_path / "model.gguf", base, None, "f16")
    value = {key: field.contents() for key, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert [value["tokenizer.ggml.eos_token_id"], value["tokenizer.ggml.eot_token_id"]] == ends
    assert value["tokenizer.chat_template"] == TEMPLATE
    assert value["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert value["tokenizer.chat_templates"] == ["tool_use"]
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    stops = [
        id for id in range(len(value["tokenizer.ggml.tokens"])) if llama_cpp.api.llama_vocab_is_eog(llama_cpp.vocab, id)
    ]
    assert sorted(stops) == sorted(ends)
    assert load(tmp_path / "model.gguf", []).tokenizer.eos_token_ids == set(ends)


def train_sentencepiece(folder: Path, space_prefix: bool) -> tuple[Any, Tokenizer]:
    """SentencePiece's own tokenizer, and what transformers makes of such a one in a tokenizer.json."""
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges

    corpus = [line for text in (Path(json.__file__).read_text(), *TEXTS) for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "spm"), model_type="bpe", vocab_size=900,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=space_prefix, minloglevel=2,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    vocabulary = {spm.id_to_piece(piece): piece for piece in range(spm.vocab_size())}
    scores = {piece: spm.get_score(number) for piece, number in vocabulary.items()}
    merges = generate_merges(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return spm, tokenizer


@pytest.mark.parametrize("space_prefix", [True, False])
def test_a_sentencepiece_tokenizer_gets_scores_that_order_its_merges(tmp_path: Path, space_prefix: bool) -> None:
    spm, tokenizer = train_sentencepiece(tmp_path, space_prefix)
    folder = save_model(tmp_path / "folder", "llama", tokenizer, {}, special=("<s>", "</s>", "<unk>"))
    base, path = load(folder, []), tmp_path / "model.gguf"
    assert gguf_model.write(path, base, None, "f32") == []
    llama_cpp = LlamaCpp(path)
    again = model.load_tokenizer(gguf_base.convert(path, tmp_path))
    for text in [*TEXTS, "<s>Hi</s> you", "<unk> <0x0A>"]:
        ids = llama_cpp.tokenize(text)
        assert ids == base.tokenizer.encode(text) == again.encode(text), text
        if "\0" not in text and "<" not in text:
            assert ids == [spm.bos_id(), *spm.encode(text)], text


# A base that was a GGUF file


def assert_only_these_differ(written: GGUFReader, source: GGUFReader, tensors: set[str]) -> None:
    mine, theirs = (
        {
            key: (field.types, b"".join(part.tobytes() for part in field.parts))
            for key, field in file.fields.items()
            if not key.startswith("GGUF.")
        }
        for file in (written, source)
    )
    assert list(mine)[: len(theirs)] == list(theirs)
    for key, field in theirs.items():
        assert key == "general.file_type" or mine[key] == field, key
    assert mine.keys() - theirs.keys() <= {"general.file_type", "general.quantization_version"}
    before, after = ({tensor.name: tensor for tensor in file.tensors} for file in (source, written))
    assert list(after) == list(before)
    for name, tensor in before.items():
        same = tensor.tensor_type == after[name].tensor_type and np.array_equal(tensor.data, after[name].data)
        assert same is (name not in tensors), name


def test_only_adapted_matrices_of_a_gguf_base_are_written_anew(smollm2_gguf: Path, tmp_path: Path) -> None:
    base = load(smollm2_gguf, [])
    lora.attach(base.model, Lora(target_modules=["q_proj", "down_proj"], layers="10-14", rank=4, alpha=8.0))
    tiny.randomize(base.model, size=0.3)
    path = tmp_path / "model.gguf"
    notes = gguf_model.write(path, base, smollm2_gguf, "f16")
    assert notes == [
        "10 adapted matrices are F16; the other 262 tensors are as in the base's file, byte for byte, and so is the "
        "metadata, but for general.file_type"
    ]
    adapted = {f"blk.{block}.{name}.weight" for block in range(10, 15) for name in ("attn_q", "ffn_down")}
    file = GGUFReader(path)
    assert_only_these_differ(file, GGUFReader(smollm2_gguf), adapted)
    assert file.fields["general.file_type"].contents() == 1
    layer = lora.layers(base.model)["model.layers.12.self_attn.q_proj"]
    merged = tiny.float64(layer.merged_weight()).astype(np.float16)
    written = next(tensor.data for tensor in file.tensors if tensor.name == "blk.12.attn_q.weight")
    assert np.array_equal(gguf_layout.deinterleave(written, 64), merged)

    prompt = base.tokenizer.encode("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n")
    mlx_change = logits(base, prompt)
    lora.disable(base.model)
    mlx_change -= logits(base, prompt)
    before = LlamaCpp(smollm2_gguf).logits(prompt)
    llama_cpp = LlamaCpp(path)
    change = llama_cpp.logits(prompt) - before
    # llama.cpp rounds the activations before its products with quantised matrices, so the logits are only alike
    alike = (change * mlx_change).sum() / np.linalg.norm(change) / np.linalg.norm(mlx_change)
    print(f"change of the logits: up to {np.abs(mlx_change).max():.1f} in mlx, {np.abs(change).max():.1f} in llama.cpp")
    print(f"cosine {alike:.4f}")
    assert alike > 0.9
    assert llama_cpp.answer(prompt, base.tokenizer.eos_token_ids, 8)


def test_a_gguf_base_and_its_adapter_give_the_logits_of_mlx(tmp_path: Path) -> None:
    def unusual(writer: Any) -> None:
        writer.add_custom_alignment(1024)
        writer.add_array("general.tags", ["a", "ünï"])
        writer.add_array("test.numbers", [1.5, -2.5])
        writer.add_int8("test.small", -3)

    weights = tiny_weights(SIZES, attention_bias=True)
    source = write_gguf(tmp_path / "base.gguf", to_gguf(weights, SIZES), change=unusual)
    base = load(source, ["q_proj", "k_proj", "up_proj", "embed_tokens", "lm_head"])
    path, tokens = tmp_path / "model.gguf", list(range(100))
    expected = logits(base, tokens)
    gguf_model.write(path, base, source, "f32")
    assert difference(path, expected, tokens) < 1e-4
    adapted = {f"blk.{block}.{name}.weight" for block in (0, 1) for name in ("attn_q", "attn_k", "ffn_up")}
    adapted |= {"token_embd.weight", "output.weight"}
    assert_only_these_differ(GGUFReader(path), GGUFReader(source), adapted)
    lora.detach(base.model)
    gguf_model.write(path, base, source, "f16")
    assert path.read_bytes() == source.read_bytes()  # nothing is adapted
    assert difference(path, expected, tokens) > 1


def test_another_file_than_the_base_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "base.gguf", to_gguf(tiny_weights(SIZES), SIZES))
    base = load(source, "q_proj")
    with pytest.raises(InputError, match=r"no tensor blk.0.attn_q.weight of shape \(64, 64\); is it the base's own"):
        gguf_model.write(tmp_path / "model.gguf", base, smollm2_gguf, "f16")
    for bad, reason in ((tmp_path / "absent.gguf", "cannot be read"), (Path(__file__), "not a GGUF file")):
        with pytest.raises(InputError, match=reason):
            gguf_model.write(tmp_path / "model.gguf", base, bad, "f16")
    assert [file.name for file in tmp_path.iterdir()] == ["base.gguf"]


# Whole or absent, and one tensor at a time


@pytest.fixture
def files_of_200_kb_at_most() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("files_of_200_kb_at_most")
def test_a_full_disk_leaves_what_was_there(folders: Callable[[str], Path], tmp_path: Path) -> None:
    base = load(folders("llama"))
    path = tmp_path / "model.gguf"
    path.write_text("before")
    with pytest.raises(InputError, match=r"model\.gguf: cannot be written \(.*File too large"):
        gguf_model.write(path, base, None, "f32")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (65600.0, "f16", r": 65\d\d\d.*, its largest number, does not fit into F16; write another type"),
        (-65600.0, "f16", r": 65\d\d\d.*, its largest number, does not fit into F16"),
        (1e7, "q8_0", r": 1e\+07, its largest number, does not fit into Q8_0"),
        (float("nan"), "f32", " has values that are not finite"),
        (float("inf"), "bf16", " has values that are not finite"),
    ],
)
def test_numbers_too_large_leave_what_was_there(
    folders: Callable[[str], Path], tmp_path: Path, value: float, dtype: Any, reason: str
) -> None:
    base = load(folders("qwen2"))
    layer = base.model.model.layers[1].mlp.up_proj
    layer.base.weight[3, 4] = value
    path = tmp_path / "model.gguf"
    path.write_text("before")
    with pytest.raises(InputError, match=f"model.layers.1.mlp.up_proj{reason}"):
        gguf_model.write(path, base, None, dtype)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16}
    base = load(save_model(tmp_path / "folder", "llama", tokenizers["gpt2"], shape))
    largest = 911 * 256 * 4
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    gguf_model.write(tmp_path / "model.gguf", base, None, "f16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"largest {largest:,}, numpy {peak:,}, mlx {mx.get_peak_memory() - before:,}")
    assert peak < 4 * largest
    assert mx.get_peak_memory() - before < 4 * largest
    assert (tmp_path / "model.gguf").stat().st_size > 10 * largest


# Refusals


def test_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    base = Base(tiny.qwen3_moe(), None, {"model_type": "qwen3_moe"}, tmp_path, {"name": "x"})
    with pytest.raises(InputError, match=r"type 'qwen3_moe' are not written .* merged .* convert_hf_to_gguf\.py"):
        gguf_model.write(tmp_path / "model.gguf", base, None, "f16")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        ("llama", {"rope_scaling": YARN | {"beta_fast": 16}}, "RoPE scaling 'yarn'"),
        ("llama", {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}, "RoPE scaling 'yarn'"),
        ("qwen3", {"rope_scaling": LLAMA3_ROPE}, "RoPE scaling 'llama3' .* for qwen3"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding attention"),
        ("llama", {"rope_traditional": True}, "rope_traditional"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    folders: Callable[[str], Path], tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    base = load(folders(name), [])
    for key, value in changes.items():
        setattr(base.model.args, key, value)
    with pytest.raises(InputError, match=reason):
        gguf_model.write(tmp_path / "model.gguf", base, None, "f16")


def change_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Base], None]:
    def apply(base: Base) -> None:
        content = json.loads(base.tokenizer.backend_tokenizer.to_str())
        change(content)
        base.tokenizer._tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))

    return apply


def four_ends(base: Base) -> None:
    base.tokenizer._eos_token_ids |= {1, 2, 3}


def no_end(base: Base) -> None:
    base.tokenizer._tokenizer.eos_token = None


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}
BERT = {"type": "BertProcessing", "sep": ["<|im_end|>", 902], "cls": ["<|endoftext|>", 900]}
BAD_TOKENIZERS: dict[str, tuple[Callable[[Base], None], str]] = {
    "unigram": (change_tokenizer(lambda it: it.update(model=UNIGRAM, added_tokens=[])), "Unigram, is no plain BPE"),
    "dropout": (change_tokenizer(lambda it: it["model"].update(dropout=0.1)), "no plain BPE"),
    "suffix": (change_tokenizer(lambda it: it["model"].update(end_of_word_suffix="</w>")), "no plain BPE"),
    "lowercase": (change_tokenizer(lambda it: it.update(normalizer={"type": "Lowercase"})), "normalizer"),
    "prefix space": (change_tokenizer(lambda it: it["pre_tokenizer"].update(add_prefix_space=True)), "none of def"),
    "no splits": (change_tokenizer(lambda it: it["pre_tokenizer"].update(use_regex=False)), "none of default"),
    "no bytes": (change_tokenizer(lambda it: it.update(pre_tokenizer={"type": "Whitespace"})), "none of default"),
    "no pre-tokenizer": (change_tokenizer(lambda it: it.update(pre_tokenizer=None)), "none of default"),
    "whole words": (change_tokenizer(lambda it: it["model"].update(ignore_merges=True)), "none of default"),
    "spaces": (change_tokenizer(lambda it: it["model"].update(byte_fallback=True)), "does not treat spaces"),
    "around a text": (change_tokenizer(lambda it: it.update(post_processor=BERT)), "other tokens than BOS and EOS"),
    "four ends": (four_ends, "4 tokens end an answer"),
    "no end": (no_end, "no end-of-text token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    folders: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    base = load(folders("mistral"), [])
    change, reason = BAD_TOKENIZERS[case]
    change(base)
    with pytest.raises(InputError, match=reason) as caught:
        gguf_model.write(tmp_path / "model.gguf", base, None, "f16")
    assert "\n" not in str(caught.value)


def apart(content: dict[str, Any]) -> None:
    """Moves one of two ways to make a token to the end, where no score of the token puts it."""
    merges = content["model"]["merges"]
    tokens = ["".join(merge) for merge in merges]
    merges.append(merges.pop(next(place for place, token in enumerate(tokens) if token == tokens[place + 1])))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (apart, "no scores of tokens"),
        (lambda it: it["model"]["merges"].pop(), "no scores of tokens"),
        (lambda it: it.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁",
            "prepend_scheme": "first", "split": False}), "does not treat spaces"),
    ],
)  # fmt: skip
def test_merges_without_scores_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    _, tokenizer = train_sentencepiece(tmp_path, True)
    content = json.loads(tokenizer.to_str())
    change(content)
    changed = Tokenizer.from_str(json.dumps(content))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=changed, bos_token="<s>", eos_token="</s>")
    with pytest.raises(InputError, match=reason):
        gguf_vocab.vocabulary(TokenizerWrapper(wrapped), 907)


def test_more_tokens_than_rows_are_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="token 903, but the embedding only 900 rows"):
        gguf_vocab.vocabulary(load(folders("mistral"), []).tokenizer, 900)


def test_tokens_that_take_spaces_away_are_named(folders: Callable[[str], Path]) -> None:
    base = load(folders("mistral"), [])
    change_tokenizer(lambda content: content["added_tokens"][3].update(rstrip=True))(base)
    _, notes = gguf_vocab.vocabulary(base.tokenizer, 911)
    assert notes == ["llama.cpp does not take the spaces beside <tool_call> away, as the tokenizer does"]
