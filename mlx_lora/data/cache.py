"""Tokenized rows on the disk: made once for the same rows, tokenizer and options, and mapped wherever they are read.

A folder holds the arrays of `examples` and a manifest. Its name is the digest of all that its content depends on: the
bytes of the files, wherever they lie, the tokenizer and its chat template, the options, and the code that reads them.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import chat, files
from mlx_lora.config import Data
from mlx_lora.data import sources
from mlx_lora.data.examples import ARRAYS, Store, opened
from mlx_lora.errors import InputError

SMALL = 1_000_000  # bytes of files whose rows are tokenized in about a second: they are not cached
MANIFEST = "manifest.json"
KEPT_FOR = 30  # days after its last use
CODE = ("__init__", "cache", "examples", "formats", "oddities", "sources")  # of this package: what makes the rows
OPTIONS = {"format", "columns", "reasoning", "loss_on", "max_seq_length", "on_overflow"}


@dataclass(frozen=True)
class Kept:
    """What the manifest says: of the places of rows all but the number, notes, and what is wrong with faulty rows."""

    prefixes: list[str]
    notes: list[str]
    faulty: list[str]
    faults: int


def rows(
    paths: list[str], tokenizer: Any, config: Data, fill: Callable[[Store], Kept]
) -> tuple[dict[str, np.ndarray], Kept]:
    """The arrays of the rows in these sources, which `fill` puts into a store where they are not in the cache.

    Raises InputError where the cache cannot be written.
    """
    by_path = [_files(path) for path in paths]
    found = [file for files in by_path for file in files]
    if all(isinstance(file, Path) for file in found) and sum(Path(file).stat().st_size for file in found) < SMALL:
        store = Store()
        kept = fill(store)
        return store.close(), kept
    folder = files.cache_folder("rows") / _key(by_path, tokenizer, config)
    names = [str(file) for file in found]
    try:
        read = _read(folder, names)
        if read is None:
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, names, fill)
            read = _read(folder, names)
            assert read is not None
        os.utime(folder)
        return read
    except OSError as error:
        raise InputError(
            f"{folder}: the tokenized rows cannot be kept there ({error.strerror or error}); set MLX_LORA_CACHE to a "
            "folder with enough room"
        ) from None


def _make(folder: Path, names: list[str], fill: Callable[[Store], Kept]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _forget_old(folder.parent)
    try:
        with files.new_folder(folder) as temporary:
            kept = fill(Store(temporary))
            digests = {name: files.sha256(temporary / name) for name in ARRAYS}
            files.write_json(temporary / MANIFEST, {"files": names, "sha256": digests, **asdict(kept)})
    except OSError:
        if not (folder / MANIFEST).exists():  # or another process was quicker
            raise


def _read(folder: Path, names: list[str]) -> tuple[dict[str, np.ndarray], Kept] | None:
    """What a folder holds, with the names that the files have now; None where it is not there, or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if any(files.sha256(folder / name) != manifest["sha256"][name] for name in ARRAYS):
            return None
        now = dict(zip(manifest["files"], names, strict=True))
        kept = Kept(*(manifest[field.name] for field in fields(Kept)))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None

    def moved(text: str) -> str:
        name = next((name for name in now if text.startswith(f"{name}:")), "")
        return now.get(name, "") + text.removeprefix(name)

    return opened(folder), replace(kept, prefixes=[*map(moved, kept.prefixes)], faulty=[*map(moved, kept.faulty)])


def _files(path: str) -> list[Path | str]:
    return [path] if path.startswith(sources.HUB) else [*sources.files(Path(path))]


def _key(by_path: list[list[Path | str]], tokenizer: Any, config: Data) -> str:
    modules = [Path(chat.__file__), *(Path(__file__).with_name(f"{name}.py") for name in CODE)]
    parts: dict[str, Any] = {
        "code": hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest(),
        "versions": {name: version(name) for name in ("mlx-lm", "transformers", "tokenizers", "jinja2")},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": [tokenizer.chat_template, str(getattr(tokenizer, "_chat_template", None))],
        "stops": [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.eos_token_ids)],
        "options": config.model_dump(include=OPTIONS),
        "sources": [
            [
                [*sources.kind(file), files.sha256(file)] if isinstance(file, Path) else sources.hub_digest(file)
                for file in found
            ]
            for found in by_path
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _forget_old(cache: Path) -> None:
    """Removes what was not used for long, and what killed processes left."""
    for folder in cache.iterdir():
        days = 1 if folder.name.startswith(files.TEMPORARY) else KEPT_FOR
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > days * 86400:
                shutil.rmtree(folder, ignore_errors=True)
