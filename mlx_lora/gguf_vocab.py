"""A Hugging Face tokenizer as the metadata of a GGUF file: the inverse of `gguf_base.tokenizer`.

The tokenizer is taken as training used it, so it matters little which files it was read from. llama.cpp splits a text
by one of the patterns that it knows by name (tokenizer.ggml.pre) and normalises nothing: a tokenizer whose parts are
not exactly these is refused. The one exception is NFC, which Qwen's tokenizers ask for; texts in NFC, which is nearly
all there are, get the same ids.
"""

import json
from typing import Any

from gguf.constants import TokenType
from tokenizers import pre_tokenizers

from mlx_lora.errors import InputError
from mlx_lora.gguf_base.tokenizer import GPT2_PATTERN, PRE_TOKENIZERS, WHOLE_WORDS_AND_BOS

# The contractions as Llama 3 and Qwen write them, and as llama.cpp does. (They differ in the long s.)
CASELESS_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CONTRACTIONS = "'[sStTmMdD]|'[rR][eE]|'[vV][eE]|'[lL][lL]"
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
WAY_OUT = (
    "write the merged folder instead and convert it with llama.cpp's convert_hf_to_gguf.py, or train on the GGUF file "
    "of the base"
)


def vocabulary(tokenizer: Any, rows: int) -> tuple[dict[str, Any], list[str]]:
    """The keys tokenizer.* for a model whose embedding has `rows` rows, and what a person should know about them.

    `tokenizer` is mlx-lm's wrapper. Rows beyond its tokens become unused ones, [PADn]. Raises InputError for a
    tokenizer that llama.cpp would not follow exactly.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise InputError(f"the tokenizer is of no kind that tokenizer.json can hold; {WAY_OUT}")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise InputError(f"the tokenizer's model, {model['type']}, is no plain BPE; {WAY_OUT}")
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: entry["content"] for number, entry in added.items()}
    if max(texts) >= rows:
        raise InputError(f"the tokenizer has a token {max(texts)}, but the embedding only {rows} rows; mend the model")
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_type(number, texts, added, model) for number in range(rows)]
    keys = _sentencepiece(content, tokens, types) if model.get("byte_fallback") else _byte_level(content)
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [int(kind) for kind in types]}
    keys |= _special_ids(tokenizer) | _added_ends(tokenizer) | _chat_templates(tokenizer)
    greedy = [
        entry["content"] for entry in added.values() if entry["lstrip"] or entry["rstrip"] or entry["single_word"]
    ]
    notes = []
    if greedy:
        notes.append(f"llama.cpp does not take the spaces beside {', '.join(greedy)} away, as the tokenizer does")
    return keys, notes


def _type(number: int, texts: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> TokenType:
    text = texts.get(number)
    if text is None:
        return TokenType.UNUSED
    if model.get("byte_fallback") and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if model.get("byte_fallback") and text in BYTE_TOKENS else TokenType.NORMAL


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def _byte_level(content: dict[str, Any]) -> dict[str, Any]:
    model = content["model"]
    if any(part["type"] != "NFC" for part in _parts(content["normalizer"], "normalizers")):
        raise InputError(f"the tokenizer's normalizer is not known to llama.cpp; {WAY_OUT}")
    if model.get("unk_token") and any(char not in model["vocab"] for char in pre_tokenizers.ByteLevel.alphabet()):
        raise InputError(f"the tokenizer has an unknown token and lacks bytes, which llama.cpp leaves out; {WAY_OUT}")
    patterns = _patterns(content["pre_tokenizer"])
    whole_words = bool(model.get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if patterns == known and whole_words == (name in WHOLE_WORDS_AND_BOS):
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            if not merges:
                raise InputError(f"the tokenizer has no merges, without which llama.cpp loads none; {WAY_OUT}")
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    raise InputError(
        f"the tokenizer's pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}, the ones known here; {WAY_OUT}"
    )


def _patterns(pre_tokenizer: dict[str, Any] | None) -> list[str] | None:
    """The patterns that split a text one after the other, as in PRE_TOKENIZERS; None where something else does."""
    patterns = []
    *splits, last = _parts(pre_tokenizer, "pretokenizers") or [{"type": None}]
    for part in splits:
        if part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(r"\p{N}")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            patterns.append(part["pattern"].get("Regex", "").replace(CASELESS_CONTRACTIONS, CONTRACTIONS))
        else:
            return None
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    return [*patterns, GPT2_PATTERN] if last["use_regex"] else patterns


def _parts(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """What a sequence of normalizers or pre-tokenizers consists of; a single one is a sequence of one."""
    if part is None:
        return []
    return [inner for outer in part[name] for inner in _parts(outer, name)] if part["type"] == "Sequence" else [part]


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def _sentencepiece(content: dict[str, Any], tokens: list[str], types: list[TokenType]) -> dict[str, Any]:
    """The scores that order the merges, best first, as `gguf_base.tokenizer` reads them: all ways to split a token in
    two tokens stand together."""
    parts = _parts(content["normalizer"], "normalizers")
    kinds = [(part["type"], part.get("prepend"), part.get("content")) for part in parts]
    prefix, space = ("Prepend", "▁", None), ("Replace", None, "▁")
    if kinds not in ([prefix, space], [space]) or content["pre_tokenizer"] is not None:
        raise InputError(f"the tokenizer does not treat spaces as llama.cpp does; {WAY_OUT}")
    vocabulary = set(tokens)
    if not vocabulary >= BYTE_TOKENS:
        raise InputError(f"the tokenizer lacks byte tokens; {WAY_OUT}")
    merges: dict[str, set[int]] = {}  # token -> where it is split
    last = None
    for merge in content["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token in merges and token != last:
            raise _no_scores(token)
        merges.setdefault(token, set()).add(len(left))
        last = token
    for token, kind in zip(tokens, types, strict=True):
        halves = [(middle, token[:middle], token[middle:]) for middle in range(1, len(token))]
        splits = {middle for middle, left, right in halves if left in vocabulary and right in vocabulary}
        if kind == TokenType.NORMAL and splits != merges.get(token, set()):
            raise _no_scores(token)
    ranks = {token: rank for rank, token in enumerate(merges)}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-ranks.get(token, len(ranks))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix in kinds,
    }


def _no_scores(token: str) -> InputError:
    return InputError(f"no scores of tokens give the tokenizer's order of merges (see token '{token}'); {WAY_OUT}")


# ---- ends, beginnings and templates ----------------------------------------------------------------------------------


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    """The ids with a role. Further tokens that end an answer become eot and eom: llama.cpp stops at all three."""
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {name: getattr(tokenizer, f"{role}_token_id") for name, role in roles.items()}
    if ids["eos"] is None:
        raise InputError("the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    ends = sorted(set(tokenizer.eos_token_ids) - {ids["eos"]})
    if len(ends) > 2:
        raise InputError(f"{len(ends) + 1} tokens end an answer, and a GGUF file holds three; shorten eos_token_id")
    ids |= dict(zip(("eot", "eom"), ends, strict=False))
    return {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}


def _added_ends(tokenizer: Any) -> dict[str, Any]:
    """Whether BOS and EOS are put around a text, seen from one: post-processors come in many forms."""
    inner = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.backend_tokenizer.encode("a").ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        if whole == bos * first + inner + eos * last:
            return {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
    raise InputError(f"the tokenizer puts other tokens than BOS and EOS around a text; {WAY_OUT}")


def _chat_templates(tokenizer: Any) -> dict[str, Any]:
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    others = {name: template for name, template in templates.items() if name != "default"}
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": template for name, template in others.items()}
    if others:
        keys["tokenizer.chat_templates"] = list(others)
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates["default"]
    return keys
