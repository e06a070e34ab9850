"""Where rows come from: files, folders of them and the hub → rows, each with its place.

A file holds one JSON object a line (.jsonl), a list of them (.json), a table (.csv, .tsv, .parquet) or plain text
(.txt, .md), and may be compressed (.gz, .zst). The suffix says which; any other is read as .jsonl.
"""

import csv
import errno
import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from mlx_lora.errors import InputError
from mlx_lora.files import finite

HUB = "hub:"
PACKED = 4096  # bytes that are decompressed at a time: what they grow to is bounded
COMPRESSED = (".gz", ".zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXTS = (".txt", ".md")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", *DELIMITERS, *TEXTS)
UNREAD = {".arrow", ".bz2", ".feather", ".tar", ".tgz", ".xls", ".xlsx", ".xz", ".zip"}
HELD_OUT = {"valid", "validation", "val", "dev", "test", "eval"}  # names of files that nobody means to train on
CHARACTERS = 3  # of a token, at least, in most languages
MAX_LISTED = 20


@dataclass(frozen=True)
class Row:
    """One row and where it stands. A ``document`` is cut into pieces, each a row; the ``last`` ends it."""

    content: dict[str, Any]
    place: str  # file:line
    document: bool = False
    last: bool = True


def entries(path: str | Path, longest: int = 2048) -> Iterator[Row | str]:
    """The rows of a file, of all files in a folder, or of ``hub:OWNER/NAME[@CONFIG][:SPLIT]`` (through `datasets`), one
    after the other; in the place of a faulty one, where it stands and what is wrong with it.

    Plain text is cut between paragraphs, or else between lines or words, into rows of about `longest` tokens that give
    the text again when put together. Raises InputError for what cannot be read, or holds no rows.
    """
    if str(path).startswith(HUB):
        found: Iterator[Row | str] = _hub(str(path))
    else:
        found = (entry for file in files(Path(path)) for entry in _rows(file, longest))
    entry = None
    for entry in found:
        yield entry
    if entry is None:
        raise InputError(f"{path}: holds no rows; put some into it")


def read(path: str | Path, longest: int = 2048) -> list[Row]:
    """The rows of `entries`, all in memory. Raises InputError that lists up to 20 faulty lines by number."""
    found = list(entries(path, longest))
    raise_all([entry for entry in found if isinstance(entry, str)])
    return [entry for entry in found if isinstance(entry, Row)]


def raise_all(faults: Sequence[str]) -> None:
    """One InputError for all faults, of which the first 20 are listed; nothing where there are none."""
    if faults:
        more = [f"... and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        raise InputError("\n       ".join([*faults[:MAX_LISTED], *more]))


def digest(rows: Iterable[Row]) -> str:
    """sha256 over the content of the rows, in order."""
    total = hashlib.sha256()
    for row in rows:
        text = json.dumps(row.content, sort_keys=True, default=str)  # tables hold dates and bytes too
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


# ---- files -----------------------------------------------------------------------------------------------------------


def files(path: Path) -> list[Path]:
    """The file itself, or a folder's files of rows in the order of their names."""
    try:
        if not path.is_dir():
            if path.is_fifo() or path.is_socket():  # rows are read several times
                raise OSError(errno.EINVAL, "is a pipe")
            with finite(path).open("rb"):
                return [path]
        inside = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        for file in inside:
            if file.is_dir() and any(kind(each)[0] in SUFFIXES for each in file.iterdir()):
                raise InputError(f"{path}: holds a folder of rows, {file.name}; name it, too: data.train takes a list")
            if kind(file)[0] in SUFFIXES or kind(file)[1]:
                finite(file).stat()  # a broken link has none
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if unread := [file.name for file in inside if file.suffix.lower() in UNREAD]:
        raise InputError(f"{path}: holds {unread[0]}, which cannot be read here; convert it, or move it elsewhere")
    found = [file for file in inside if kind(file)[0] in SUFFIXES and file.is_file()]
    if not found:
        raise InputError(f"{path}: holds no files of rows ({', '.join(SUFFIXES)})")
    held_out = [file.name for file in found if re.split(r"[.\-_]", file.name.lower())[0] in HELD_OUT]
    if 0 < len(held_out) < len(found):
        raise InputError(
            f"{path}: holds {held_out[0]}, which is not to be trained on; name the files, as in data.train: "
            f"{path / 'train.jsonl'} and data.valid: {path / held_out[0]}"
        )
    texts = [file.name for file in found if kind(file)[0] in TEXTS]
    if texts and len(texts) < len(found):
        raise InputError(f"{path}: holds {texts[0]} beside files of rows; name the files, or move it elsewhere")
    return found


def kind(path: Path) -> tuple[str, str]:
    """A file's suffix, and that of its compression ("" for none)."""
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _rows(path: Path, longest: int) -> Iterator[Row | str]:
    """The entries of a file."""
    suffix, packed = kind(path)
    with _opened(path, packed) as stream:
        if suffix in TEXTS:
            yield from _pieces(path, _text(path, stream), CHARACTERS * longest)
            return
        if suffix == ".parquet":
            found = _parquet(path, io.BytesIO(stream.read()) if packed else stream)
        elif suffix == ".json":
            found = _list(path, stream)
        elif suffix in DELIMITERS:
            found = _table(path, _text(path, stream), DELIMITERS[suffix])
        else:
            found = _lines(stream)
        for place, entry in found:
            if isinstance(entry, dict):
                yield Row(entry, f"{path}:{place}")
            else:
                yield f"{path}:{place}: {entry if isinstance(entry, str) else 'is not a JSON object'}"


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as they are read."""
    with ExitStack() as opened:
        try:
            stream: Any = opened.enter_context(finite(path).open("rb"))
            if packed == ".gz":
                stream = opened.enter_context(gzip.GzipFile(fileobj=stream))
            elif packed == ".zst":
                stream = opened.enter_context(io.BufferedReader(_Frames(stream)))
            yield stream
        except ModuleNotFoundError:
            raise _missing(path, "zstandard") from None
        except InputError:
            raise
        except Exception as error:  # gzip, zlib and zstandard have errors of their own
            if isinstance(error, OSError) and error.errno:
                raise _unreadable(path, error) from None
            if not packed:
                raise
            raise InputError(f"{path}: is not {packed} data, or damaged ({error})") from None


class _Frames(io.RawIOBase):
    """What the frames of a .zst file hold. zstandard's own reader takes a file that is cut off for a whole one."""

    def __init__(self, packed: BinaryIO) -> None:
        import zstandard

        self._packed = packed
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._read = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._read = self._read or self._packed.read(PACKED)
            if self._frame is None and self._read:
                self._frame = self._decompressor.decompressobj()
            elif not self._read:
                if self._frame is not None:
                    raise EOFError("it is cut off")
                return 0
            self._unpacked = self._frame.decompress(self._read)
            self._read = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{path}: cannot be read ({reason}); name a file or folder of rows")


def _missing(path: Any, package: str) -> InputError:
    return InputError(f'{path}: needs {package}: pip install "mlx-lora[data]"')


def _text(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The lines of a text, with their ends."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: is {_no_utf8(error)}") from None


def _no_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start + 1} of the line); convert the file to UTF-8"


# ---- what a file holds: (line or row number, value) of each entry; a value that is a string says what is wrong -------


def _lines(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            entry = _parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            entry = f"is {_no_utf8(error)}"
        except (ValueError, RecursionError) as error:
            entry = f"is not valid JSON ({error}); each line is one JSON object"
        else:
            entry = [entry] if isinstance(entry, str) else entry
        yield str(number), entry


def _list(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The entries of one JSON list, which is in memory as a whole."""
    try:
        found = _parse(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); convert it to UTF-8") from None
    except (ValueError, RecursionError) as error:
        lines = "; one object a line? then name it .jsonl" if str(error).startswith("Extra data") else ""
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: is not valid JSON ({error}){lines}") from None
    if not isinstance(found, list):
        raise InputError(f"{path}: is not a list of rows; a .json file holds one list, a .jsonl file one row a line")
    for number, entry in enumerate(found, 1):
        yield f"row {number}", entry if not isinstance(entry, str) else [entry]


def _parse(text: str) -> Any:
    """Strict JSON: NaN, Infinity and repeated keys are errors."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repetition)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return found


def _table(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows of cells under the names in the first line; columns without a name are left out."""
    csv.field_size_limit(sys.maxsize)
    # old spreadsheets end lines with \r alone
    ended = (part for line in lines for part in re.split("(?<=\r)(?!\n)", line) if part)
    reader = csv.reader(ended, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    first = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield str(first), f"is not a valid row of cells ({error})"
            return
        if cells is None:
            return
        if not cells:
            pass
        elif names is None:
            names = [name.strip() for name in cells]
            named = list(filter(None, names))
            if len(named) == 1 and delimiter == "," and ";" in named[0]:
                raise InputError(f"{path}:1: has semicolons between its cells; save it with commas")
            if not named or len(set(named)) < len(named):
                raise InputError(f"{path}:1: is no header; the first line names each column, once")
        elif len(cells) == len(names):
            yield str(first), {name: cell for name, cell in zip(names, cells, strict=True) if name}
        else:
            yield str(first), f"has {len(cells)} cells, the header {len(names)}; quote cells that hold {delimiter!r}"
        first = reader.line_num + 1


def _parquet(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise _missing(path, "pyarrow") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(1024):
            for entry in batch.to_pylist():
                number += 1
                yield f"row {number}", _without_nulls(entry)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not Parquet, or damaged ({' '.join(str(error).split())})") from None


def _without_nulls(value: Any) -> Any:
    """Without the keys that a table has for the sake of other rows: one that a row had not is null in Arrow. A message
    may have null for its content."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if each is not None or key == "content"}
        return {key: _without_nulls(each) for key, each in kept.items()}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _pieces(path: Path, lines: Iterable[str], characters: int) -> Iterator[Row]:
    """A document as rows of at most so many characters, cut at the last empty line, line or space within."""
    text, start, number = "", 0, 1  # what is read; from `start` on, on this line of the file, it is still to be given
    last: Row | None = None
    for line in chain(lines, [None]):
        text, start = text[start:] + (line or ""), 0
        while len(text) - start > (characters if line is not None else 0):
            most = start + characters
            ends = (text.rfind(mark, start, most) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((end for end in ends if end > start + characters // 2), most) if most < len(text) else len(text)
            piece = text[start:end]
            if piece.strip():
                if last is not None:
                    yield last
                last = Row({"text": piece}, f"{path}:{number}", document=True, last=False)
            elif last is not None and line is None:  # the spaces at the end
                last = replace(last, content={"text": last.content["text"] + piece})
            number += piece.count("\n")
            start = end
    if last is not None:
        yield replace(last, last=True)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _hub(name: str) -> Iterator[Row | str]:
    """The rows of a data set as `datasets` gives them; no code that it brings is run."""
    for number, entry in enumerate(_data_set(name), 1):
        yield Row(_without_nulls(entry), f"{name}:row {number}")


def hub_digest(name: str) -> str:
    """A digest of the rows of a data set: the one that `datasets` keeps."""
    return str(_data_set(name)._fingerprint)


def _data_set(name: str) -> Any:
    found = re.fullmatch(rf"{HUB}([\w.-]+(?:/[\w.-]+)?)(?:@([\w.-]+))?(?::(.+))?", name)
    if not found:
        raise InputError(f"{name}: is not of the form {HUB}OWNER/NAME[@CONFIG][:SPLIT], such as {HUB}me/rows:train")
    path, config, split = found.groups()
    try:
        import datasets
    except ModuleNotFoundError:
        raise _missing(name, "datasets") from None
    try:
        return datasets.load_dataset(path, config, split=split or "train")
    except Exception as error:  # what goes wrong there raises anything at all
        raise InputError(f"{name}: cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from None
