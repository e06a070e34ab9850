"""Files that are either whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lora.errors import InputError

TEMPORARY = ".tmp-"
LOCK = ".lock"


def cache_folder(name: str) -> Path:
    """The folder of that name in ``$MLX_LORA_CACHE``, else in the user's cache; it need not exist."""
    if root := os.environ.get("MLX_LORA_CACHE"):
        return Path(root).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_lora" / name


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what goes wrong in writing (a full disk, no permission, a vanished volume) into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
        raise InputError(f"{folder}: cannot be written ({error}); what was saved before is whole") from None


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk itself (on macOS, fsync alone leaves it in the drive's cache)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is None:
            os.fsync(descriptor)
        else:
            fcntl.fcntl(descriptor, full)
    finally:
        os.close(descriptor)


def finite(path: Path) -> Path:
    """The path. Raises OSError for a device such as /dev/zero, which has no end."""
    if path.is_char_device() or path.is_block_device():
        raise OSError(errno.EINVAL, "is a device")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end it takes the name, replacing what was there."""
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; at the end it takes the name.

    With `replace` a folder of that name is removed first; else it stays, and OSError is raised.
    """
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # never its parents: where a volume is gone, they would be made on another one
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if replace and path.exists():
            remove_folder(path)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Inside, no other process holds `folder` like this; False on the few network file systems that have no locks. The
    system lets go of it when the process ends, however it ends.

    Raises InputError where another process has it, OSError where nothing can be written there.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise InputError(
                f"output_dir: {folder} is in use by another run ({stream.read().strip()}); wait for its end, stop it, "
                "or choose another folder"
            ) from None
        except OSError:
            yield False
            return
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        yield True


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """`new_folder` for a path that a person gave. Raises InputError where it is taken or cannot be written."""
    try:
        if path.exists():
            raise InputError(f"{path}: is there already; choose another folder with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(path) as temporary:
            yield temporary
    except (InputError, OSError, RuntimeError) as error:  # MLX raises RuntimeError
        reason = str(error).replace(str(_temporary(path)), str(path))
        raise InputError(reason if isinstance(error, InputError) else f"{path}: cannot be written ({reason})") from None


def remove_folder(path: Path) -> None:
    """Removes a folder so that no half of it can be taken for the whole."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-removed-{path.name}")
    path.rename(temporary)
    shutil.rmtree(temporary)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def clear_temporaries(folder: Path) -> None:
    """Removes what killed processes left behind in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def exists(path: str | Path) -> bool:
    """Whether there is something at a path that a person gave; False for what can be none."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def write_new(path: Path, text: str) -> None:
    """Writes a text file that a person named. Raises InputError where it is there already or cannot be written."""
    if exists(path):
        raise InputError(f"{path}: is there already; choose another file with --out")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file as a person would read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
