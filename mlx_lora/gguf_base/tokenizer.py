"""A GGUF file's tokenizer as tokenizer.json: the same ids as llama.cpp (src/llama-vocab.cpp, src/unicode.cpp)."""

from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_lora import files
from mlx_lora.errors import InputError
from mlx_lora.gguf_base.reader import Metadata, get, get_list

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"'[sStTmMdD]|'[rR][eE]|'[vV][eE]|'[lL][lL]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
QWEN35_PATTERN = (
    r"'[sStTmMdD]|'[rR][eE]|'[vV][eE]|'[lL][lL]|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre: the patterns that split a text into words, applied one after the other.
PRE_TOKENIZERS = {
    "default": [r"[\p{P}$+<=>^~|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [GPT2_PATTERN],
    "smollm": [r"\p{N}", GPT2_PATTERN],
    "llama-bpe": [LLAMA3_PATTERN],
    "llama-v3": [LLAMA3_PATTERN],
    "llama3": [LLAMA3_PATTERN],
    "qwen2": [QWEN2_PATTERN],
    "deepseek-r1-qwen": [QWEN2_PATTERN],
    "qwen35": [QWEN35_PATTERN],
}
WHOLE_WORDS_AND_BOS = {"llama-bpe", "llama-v3", "llama3"}  # a word that is a token is not merged; BOS by default


def write_tokenizer(metadata: Metadata, config: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json; adds the special ids to ``config``."""
    texts = get_list(metadata, "tokenizer.ggml.tokens", str)
    tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
    if not len(set(tokens)) == len(tokens) == config["vocab_size"]:
        raise InputError(
            f"the tokenizer has {len(set(tokens))} different tokens, but the embedding has {config['vocab_size']} rows;"
            " convert the model again"
        )
    ids = _special_ids(metadata, len(tokens))
    tokenizer = _tokenizer(metadata, tokens, ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    } | {role: tokens[ids[name]] for name, role in roles.items() if name in ids}
    if "tokenizer.chat_template" in metadata:
        tokenizer_config["chat_template"] = get(metadata, "tokenizer.chat_template", str)
    files.write_json(folder / "tokenizer_config.json", tokenizer_config)
    special = {f"{role}_id": ids[name] for name, role in roles.items() if name in ids and name != "unknown"}
    config |= special
    ends = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    files.write_json(folder / "generation_config.json", special | {"eos_token_id": sorted(ends)})


def _special_ids(metadata: Metadata, vocabulary_size: int) -> dict[str, int]:
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < vocabulary_size:
            raise InputError(f"tokenizer.ggml.{name}_token_id is {number}, which is no token; convert the model again")
        ids[name] = number
    if "eos" not in ids:
        raise InputError("metadata key tokenizer.ggml.eos_token_id is missing; convert the model again")
    return ids


def _tokenizer(metadata: Metadata, tokens: list[str], ids: dict[str, int]) -> Tokenizer:
    """The tokenizer, giving the ids that llama.cpp gives when it parses special tokens in the text."""
    types = get_list(metadata, "tokenizer.ggml.token_type", int, len(tokens))
    model = get(metadata, "tokenizer.ggml.model", str)
    if model == "gpt2":
        pre = get(metadata, "tokenizer.ggml.pre", str)
        if pre not in PRE_TOKENIZERS:
            raise InputError(f"pre-tokenizer '{pre}' is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
        tokenizer = _byte_level_bpe(metadata, tokens, pre)
        bos_by_default = pre in WHOLE_WORDS_AND_BOS
    elif model == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens, types)
        bos_by_default = True
    else:
        raise InputError(f"tokenizer '{model}' is not supported; supported: gpt2 (BPE), llama (SentencePiece)")
    added = []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            added.append(AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False))
    tokenizer.add_tokens(added)
    add_bos = get(metadata, "tokenizer.ggml.add_bos_token", bool, bos_by_default)
    add_eos = get(metadata, "tokenizer.ggml.add_eos_token", bool, False)
    if add_bos and "bos" not in ids:
        raise InputError("metadata key tokenizer.ggml.bos_token_id is missing; convert the model again")
    if add_bos or add_eos:
        first, last = ["bos"] * add_bos, ["eos"] * add_eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(tokens[ids[name]] for name in first), "$A", *(tokens[ids[name]] for name in last)],
            special_tokens=[(tokens[ids[name]], ids[name]) for name in first + last],
        )
    return tokenizer


def _byte_level_bpe(metadata: Metadata, tokens: list[str], pre: str) -> Tokenizer:
    merges = []
    for merge in get_list(metadata, "tokenizer.ggml.merges", str):
        middle = merge.find(" ", 1)
        merges.append((merge[:middle], merge[middle + 1 :]))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS_AND_BOS)
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise InputError(f"the tokenizer's merges do not fit its tokens ({error}); convert the model again") from None
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Metadata, tokens: list[str], types: list[int]) -> Tokenizer:
    """BPE whose merges, best score first, are all the ways to split a token in two tokens."""
    scores = get_list(metadata, "tokenizer.ggml.scores", float, len(tokens))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        raise InputError("the tokenizer lacks byte tokens, which is not supported; use another model")
    merges: dict[float, list[tuple[str, str]]] = {}
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind in (TokenType.NORMAL, TokenType.UNUSED):
            splits = [(token[:middle], token[middle:]) for middle in range(1, len(token))]
            splits = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
            if splits and score in merges:
                raise InputError(f"token '{token}' has the same score as another one, which is not supported")
            if splits:
                merges[score] = splits
    in_order = [split for score in sorted(merges, reverse=True) for split in merges[score]]
    tokenizer = Tokenizer(models.BPE(vocabulary, in_order, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decoding: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if get(metadata, "tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend("▁"))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer
