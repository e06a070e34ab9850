"""A GGUF file as a base model: converts it, once, into a Hugging Face model folder for mlx-lm and transformers."""

import fcntl
import shutil
from pathlib import Path

from mlx_lora import files
from mlx_lora.errors import InputError
from mlx_lora.gguf_base.reader import read
from mlx_lora.gguf_base.settings import architecture, model_config
from mlx_lora.gguf_base.tokenizer import write_tokenizer
from mlx_lora.gguf_base.weights import tensor_names, write_weights

FORMAT_VERSION = 1  # of the folders written; part of their names, so that a change here converts again


def convert(path: Path, cache_dir: Path | None = None, weights: bool = True) -> Path:
    """Converts the GGUF model file ``path`` into a Hugging Face model folder and returns that folder.

    It is done once: the folder stays in ``cache_dir`` (by default ``$MLX_LORA_CACHE/gguf``, else
    ``$XDG_CACHE_HOME/mlx_lora/gguf``, else ``~/.cache/mlx_lora/gguf``) under the SHA-256 of the file. Weights in F16,
    BF16 and F32 keep their type, quantised ones become F32. Raises InputError for a file that cannot be converted
    exactly.

    Without `weights` the folder holds the configuration and the tokenizer only, where the whole is not there yet.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a GGUF model file")
    cache = cache_dir or files.cache_folder("gguf")
    try:
        folder = cache / f"{files.sha256(path)}-v{FORMAT_VERSION}"
        if not weights and not folder.is_dir():
            folder = folder.with_name(f"{folder.name}-structure")
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            _convert_locked(path, folder, weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error}; see to it, or set MLX_LORA_CACHE to a folder with enough room") from error
    return folder


def _convert_locked(path: Path, folder: Path, weights: bool) -> None:
    """Writes ``folder`` under a temporary name and renames it when it is complete, one process at a time."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it, even when we are killed
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
        if folder.is_dir():
            return
        unfinished.mkdir()
        try:
            _write_folder(path, unfinished, weights)
            for written in [*unfinished.iterdir(), unfinished]:
                files.sync(written)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write_folder(path: Path, folder: Path, weights: bool) -> None:
    metadata, tensors = read(path)
    base = architecture(metadata)
    metadata = {key.removeprefix(f"{base.name}."): value for key, value in metadata.items()}
    config = model_config(base, metadata, tensors)
    names = tensor_names(config, tensors)
    write_tokenizer(metadata, config, folder)
    files.write_json(folder / "config.json", config)
    if weights:
        write_weights(names, tensors, config["head_dim"] if base.interleaved else None, folder)
