"""llama.cpp itself, in this process, through the C API that xllamacpp's extension module exports.

Set up for comparisons: float32 cache, no flash attention.
"""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# One for all: llama.cpp keeps the pointer.
NO_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Params(ctypes.Structure):
    # Larger than any parameter struct: passed by value with all of its unknown fields at their defaults.
    _fields_ = (("bytes", ctypes.c_uint8 * 512),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def _api() -> ctypes.CDLL:
    import xllamacpp

    library = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    api = ctypes.CDLL(str(library))
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(api, name).restype = Params
    for name in (
        "llama_model_load_from_file",
        "llama_model_get_vocab",
        "llama_init_from_model",
        "llama_adapter_lora_init",
    ):
        getattr(api, name).restype = ctypes.c_void_p
    api.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    api.llama_batch_init.restype = Batch
    return api


def _context_params(api: ctypes.CDLL, length: int) -> Params:
    """The defaults with another context length, flash attention off and a float32 cache. The fields of the struct are
    found by their defaults."""
    params = api.llama_context_default_params()
    words = list(struct.unpack("<128i", bytes(params.bytes)))
    assert words[0] == 512  # n_ctx
    words[0] = length
    threads = words.index(4)
    assert words[threads : threads + 2] == [4, 4]  # n_threads and n_threads_batch
    words[threads : threads + 2] = [min(4, os.cpu_count() or 1)] * 2  # more than there are cores wait by spinning
    choices = next(place for place in range(128) if words[place : place + 4] == [-1, -1, -1, -1])
    words[choices + 3] = 0  # rope scaling, pooling, attention, flash attention: off
    pair = next(place for place in range(choices + 4, 128) if words[place : place + 2] == [1, 1])
    words[pair : pair + 2] = [0, 0]  # type_k and type_v: F16 -> F32
    params.bytes[:] = list(struct.pack("<128i", *words))
    return params


class LlamaCpp:
    """A model file, and any number of LoRA files with their scales."""

    def __init__(self, path: Path, loras: Sequence[tuple[Path, float]] = ()) -> None:
        api = self.api = _api()
        api.llama_log_set(NO_LOG, None)
        self.model = ctypes.c_void_p(
            api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        )
        assert self.model, f"llama.cpp cannot load {path}"
        self.vocab = ctypes.c_void_p(api.llama_model_get_vocab(self.model))
        self.loras = [(api.llama_adapter_lora_init(self.model, str(lora).encode()), scale) for lora, scale in loras]
        assert all(lora for lora, _ in self.loras), f"llama.cpp cannot load one of {loras}"

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        encoded = text.encode()
        ids = (ctypes.c_int32 * (len(encoded) + 8))()
        arguments = (encoded, len(encoded), ids, len(ids), ctypes.c_bool(add_special), ctypes.c_bool(True))
        count = self.api.llama_tokenize(self.vocab, *arguments)
        return list(ids[:count])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(positions, vocabulary) of one text."""
        context = self._context(len(tokens))
        try:
            return self._decode(context, tokens, 0)
        finally:
            self.api.llama_free(context)

    def answer(self, prompt: list[int], stops: set[int], max_tokens: int = 256) -> list[int]:
        """The greedy continuation, without the stop token."""
        context = self._context(len(prompt) + max_tokens)
        try:
            written: list[int] = []
            token = int(self._decode(context, prompt, 0)[-1].argmax())
            while token not in stops and len(written) < max_tokens:
                written.append(token)
                token = int(self._decode(context, [token], len(prompt) + len(written) - 1)[-1].argmax())
            return written
        finally:
            self.api.llama_free(context)

    def _context(self, length: int) -> ctypes.c_void_p:
        params = _context_params(self.api, max(length, 64))
        context = ctypes.c_void_p(self.api.llama_init_from_model(self.model, params))
        assert context
        if self.loras:
            adapters = (ctypes.c_void_p * len(self.loras))(*[lora for lora, _ in self.loras])
            scales = (ctypes.c_float * len(self.loras))(*[scale for _, scale in self.loras])
            set_adapters = self.api.llama_set_adapters_lora
            assert set_adapters(context, adapters, ctypes.c_size_t(len(self.loras)), scales) == 0
        return context

    def _decode(self, context: ctypes.c_void_p, tokens: list[int], start: int) -> np.ndarray:
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        assert self.api.llama_decode(context, batch) == 0
        size = self.api.llama_vocab_n_tokens(self.vocab)
        logits = np.ctypeslib.as_array(self.api.llama_get_logits(context), (len(tokens), size)).copy()
        self.api.llama_batch_free(batch)
        return logits

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)
