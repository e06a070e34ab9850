"""Broken input by the thousand: each piece of it is refused with a clear error, or accepted and right.

    python tests/fuzz.py [--cases 10000] [--seed 0] [--kinds config data adapter gguf]

A case is a function of (seed, kind, number): `--seed S --kinds K --first N --cases 1` does it again. A valid config,
file of rows, adapter or GGUF file is made, something in it is broken, and it is read as the commands read it. Right is:

- InputError, whose message names the file and is no traceback; the commands print it and exit with code 2,
- or a result that holds what was written: a config that reads the same after it is written out, rows that are all
  accounted for, an adapter with finite arrays that fits the model, a model folder that loads;
- within 10 seconds, in one process that goes on afterwards, with no file changed or made but in the output folder.

Exit code 1 where a case is neither.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import string
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlx_lora  # noqa: F401  (loads OpenBLAS on Linux before MLX is imported)

# isort: split
import mlx.core as mx
import yaml

from mlx_lora import adapter_files, config_file, data, lora
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Data, Lora
from mlx_lora.errors import InputError
from mlx_lora.gguf_base import convert

SECONDS = 10
PER_PROCESS = 500  # cases: a crash of the process is found by its first case that has no result
ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan]
ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\ufeff", "../../outside", "/etc/passwd", "~", "*", "null", "1e5", "=", "é", "\u202e", "😀",
    "a" * 10_000, "{{", "{% for %}", "\r\n", "\t", "\u2028", "CON", "-", "--help", "%s", "$HOME", "e\u0301",
]  # fmt: skip


class Hang(BaseException):
    """A case takes too long. No Exception, and no OSError as TimeoutError is: nothing that reads input may catch it."""


class Wrong(Exception):
    """A case was neither refused nor accepted as it should be."""


class Fuzzer:
    """Makes and judges cases in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.output = scratch / "output"
        self.output.mkdir()

    def value(self, draw: random.Random, depth: int = 0) -> Any:
        """Anything that YAML and JSON can hold."""
        kinds: list[Callable[[], Any]] = [
            lambda: None,
            lambda: draw.random() < 0.5,
            lambda: draw.choice(ODD_NUMBERS),
            lambda: draw.choice(ODD_TEXTS),
            lambda: "".join(draw.choices(string.printable, k=draw.randrange(20))),
        ]
        if depth < 3:
            kinds += [
                lambda: [self.value(draw, depth + 1) for _ in range(draw.randrange(4))],
                lambda: {str(draw.choice(ODD_TEXTS)): self.value(draw, depth + 1) for _ in range(draw.randrange(3))},
            ]
        return draw.choice(kinds)()

    def break_tree(self, tree: Any, draw: random.Random) -> Any:
        """One value of nested mappings and lists is replaced, removed, doubled or given a new neighbour."""
        places = list(_places(tree))
        if not places:
            return tree
        holder, key = draw.choice(places)
        match draw.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw.choice([*ODD_TEXTS, "rank", "messages", "role"])] = self.value(draw)
            case 2 if isinstance(holder, list):
                holder.insert(key, self.value(draw))
            case _:
                holder[key] = self.value(draw)
        return tree

    def break_bytes(self, content: bytes, draw: random.Random) -> bytes:
        """Bytes are changed, cut off, repeated, put in or taken out."""
        found = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(found) + 1)
            match draw.randrange(5):
                case 0:
                    del found[place:]
                case 1:
                    del found[place : place + draw.randrange(1, 9)]
                case 2:
                    found[place:place] = draw.randbytes(draw.randrange(1, 9))
                case 3:
                    found[place:place] = draw.choice(
                        [b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\t", b"&a *a", b"{", b"["]
                    )
                case _:
                    if place < len(found):
                        found[place] ^= 1 << draw.randrange(8)
        return bytes(found)

    # ---- kinds: each makes a case and judges it; InputError is for the caller ----------------------------------------

    def config(self, draw: random.Random) -> None:
        tree = yaml.safe_load(self.reference)
        tree |= {"model": "base", "data": tree.get("data", {}) | {"train": "rows.jsonl"}}
        path = self.scratch / "config.yaml"
        match draw.randrange(4):
            case 0:
                for _ in range(draw.randint(1, 3)):
                    self.break_tree(tree, draw)
                content = yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
            case 1:
                content = self.break_bytes(yaml.safe_dump(tree).encode(), draw)
            case 2:
                content = draw.choice(YAML_BOMBS).encode()
            case _:
                content = yaml.safe_dump(tree).encode(draw.choice(["utf-8-sig", "utf-16", "utf-32", "latin-1"]))
        path.write_bytes(content)
        overrides = (
            [f"{draw.choice(['lora.rank', 'train', 'a.b', ''])}={self.value(draw)}"] if draw.random() < 0.2 else []
        )
        loaded = config_file.load(path, overrides)
        again = self.scratch / "again.yaml"
        again.write_text(config_file.dump(loaded), encoding="utf-8")
        if config_file.load(again) != loaded:
            raise Wrong("a config reads otherwise after it is written out")

    def data(self, draw: random.Random) -> None:
        turn = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        forms: list[dict[str, Any]] = [
            {"messages": list(turn)},
            {"messages": [{"role": "system", "content": "Be brief"}, *turn, *turn], "tools": [tool]},
            {"prompt": "One", "completion": "Two"},
            {"text": "Some text"},
            {"instruction": "Add", "input": "1, 2", "output": "3"},
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
        ]
        lines = []
        form = draw.choice(forms)
        for _ in range(draw.randint(1, 6)):
            row = json.loads(json.dumps(form if draw.random() < 0.9 else draw.choice(forms)))
            for _ in range(draw.randrange(3)):
                self.break_tree(row, draw)
            lines.append(json.dumps(row, ensure_ascii=draw.random() < 0.5))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        match draw.randrange(8):
            case 0:
                content = self.break_bytes(content, draw)
            case 1:
                content = content.replace(b"\n", b"\r\n")
            case 2:
                content = content.decode("utf-8", "replace").encode(
                    draw.choice(["utf-8-sig", "utf-16", "latin-1"]), "replace"
                )
            case 3:
                content = draw.choice(JSON_BOMBS)
        path = self.scratch / "rows.jsonl"
        path.write_bytes(content)
        options = Data(
            train=str(path), loss_on=draw.choice(["assistant", "last", "all", "completion"]), max_seq_length=64
        )
        options = options.model_copy(update={"on_overflow": draw.choice(["error", "truncate", "drop"])})
        rows = data.read(path)
        found = data.tokenize(rows, self.tokenizer, options)
        if found.read != len(rows) or len(found.examples) + len(found.skipped) != found.read:
            raise Wrong(f"of {len(rows)} rows {len(found.examples)} are used and {len(found.skipped)} skipped")
        if any(not example.supervised[1:].any() or example.tokens.size > 64 for example in found.examples):
            raise Wrong("a row that teaches nothing or is too long is used")

    def adapter(self, draw: random.Random) -> None:
        folder = self.scratch / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.good_adapter, folder)
        weights, settings = folder / mlx_form.WEIGHTS, folder / mlx_form.SETTINGS
        match draw.randrange(6):
            case 0:
                tree = json.loads(settings.read_text())
                for _ in range(draw.randint(1, 2)):
                    self.break_tree(tree, draw)
                settings.write_text(json.dumps(tree))
            case 1:
                settings.write_bytes(self.break_bytes(settings.read_bytes(), draw))
            case 2:
                weights.write_bytes(self.break_bytes(weights.read_bytes(), draw))
            case 3:
                weights.write_bytes(self._broken_header(weights.read_bytes(), draw))
            case 4:
                arrays = dict(mx.load(str(weights)))
                name = draw.choice(sorted(arrays))
                array = arrays.pop(name)
                match draw.randrange(5):
                    case 0:
                        arrays[draw.choice(ODD_TEXTS) or "x"] = array
                    case 1:
                        arrays[name] = array * draw.choice([math.nan, math.inf])
                    case 2:
                        arrays[name] = mx.zeros(draw.choice([(1,), (2, 2), (0, 4), (4, 32, 1)]))
                    case 3:
                        arrays[name] = array.astype(draw.choice([mx.int32, mx.bool_, mx.float16, mx.complex64]))
                mx.save_safetensors(str(weights), arrays)
            case _:
                path = draw.choice([weights, settings])
                path.unlink()
                match draw.randrange(4):
                    case 0:
                        path.symlink_to(draw.choice(["/etc/passwd", "/dev/zero", path.name, "../nowhere"]))
                    case 1:
                        path.mkdir()
                    case 2:
                        path.touch()
        found = adapter_files.read(folder)
        adapter_files.check(self.model, found, folder)
        if not all(mx.isfinite(array).all().item() for array in found.arrays().values()):
            raise Wrong("an adapter with numbers that are not finite is accepted")

    def _broken_header(self, content: bytes, draw: random.Random) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = draw.choice([key for key in header if key != "__metadata__"])
        match draw.randrange(6):
            case 0:
                header[name]["data_offsets"] = [draw.choice(ODD_NUMBERS[:9]) for _ in range(2)]
            case 1:
                header[name]["shape"] = [draw.choice(ODD_NUMBERS[:9]) for _ in range(draw.randrange(4))]
            case 2:
                header[name]["dtype"] = draw.choice(["F64", "I8", "F8_E4M3", "X", None])
            case 3:
                header[draw.choice(["../../x", "", "\0", "a" * 10_000])] = header.pop(name)
            case 4:
                self.break_tree(header, draw)
            case _:
                return struct.pack("<Q", draw.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])) + content[8:]
        changed = json.dumps(header).encode()
        return struct.pack("<Q", len(changed)) + changed + content[8 + size :]

    def gguf(self, draw: random.Random) -> None:
        content = bytearray(self.good_gguf)
        match draw.randrange(5):
            case 0:
                content[:4] = draw.choice([b"GGML", b"\0\0\0\0", b"FUGG"])
            case 1:
                place = draw.choice([4, 8, 16])  # version, number of tensors, number of keys
                content[place : place + 4] = draw.randbytes(4)
            case 2:
                del content[draw.randrange(len(content)) :]
            case 3:
                for _ in range(draw.randint(1, 4)):
                    content[draw.randrange(self.gguf_header)] = draw.randrange(256)
            case _:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = self.scratch / "model.gguf"
        path.write_bytes(content)
        folder = convert(path, self.output / "cache", weights=True)
        arrays = {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
        mx.eval(arrays)
        json.loads((folder / "config.json").read_text())

    # ---- what is broken ----------------------------------------------------------------------------------------------

    def prepare(self, kinds: list[str]) -> None:
        sources = self.scratch / "sources"
        sources.mkdir()
        if "config" in kinds:
            self.reference = (Path(__file__).parents[1] / "configs" / "reference.yaml").read_text(encoding="utf-8")
        if "data" in kinds:
            sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
            from cases import CASES, tiny, write_model

            from mlx_lora.model import load_tokenizer

            self.tokenizer = load_tokenizer(write_model(tiny(CASES["b"]), sources / "model"), {"eos_token_id": 3})
        if "adapter" in kinds:
            import tiny as tiny_models

            self.model = tiny_models.llama()
            lora.attach(self.model, Lora(rank=4), seed=0)
            self.good_adapter = sources / "adapter"
            self.good_adapter.mkdir()
            settings = mlx_form.settings(lora.attached(self.model), 2)
            mlx_form.save(self.good_adapter, lora.parameters(self.model), settings, {})
            self.model = tiny_models.llama()
        if "gguf" in kinds:
            from test_gguf_base import tiny_weights, write_tiny

            self.good_gguf = write_tiny(sources / "good.gguf").read_bytes()
            self.gguf_header = len(self.good_gguf) - sum(array.nbytes for array in tiny_weights().values())

    def judge(self, kind: str, seed: int, number: int) -> str:
        """ "refused" or "accepted". Raises Wrong."""
        draw = random.Random(f"{seed} {kind} {number}")
        before = _listing(self.scratch.parents[1], self.output)
        signal.alarm(SECONDS)
        try:
            getattr(self, kind)(draw)
            result = "accepted"
        except InputError as error:
            named = {"config": "config.yaml", "data": "rows.jsonl", "adapter": "adapter", "gguf": "model.gguf"}[kind]
            if named not in str(error) and "--set" not in str(error):
                raise Wrong(f"an error that does not say where: {error}") from None
            result = "refused"
        except Wrong:
            raise
        except BaseException as error:
            raise Wrong(f"{type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        own = {self.scratch / name for name in ("config.yaml", "again.yaml", "rows.jsonl", "adapter", "model.gguf")}
        changed = _listing(self.scratch.parents[1], self.output) ^ before
        if new := [entry for entry in changed if not any(entry[0].is_relative_to(place) for place in own)]:
            raise Wrong(f"made, changed or removed {sorted(new)}")
        shutil.rmtree(self.output)
        self.output.mkdir()
        return result


def _places(tree: Any) -> Any:
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in entries:
        yield tree, key
        if isinstance(value, (dict, list)) and value:
            yield from _places(value)


def _listing(folder: Path, without: Path) -> set[tuple[Path, int, int]]:
    """Every file in a folder, with its size and the time of its last change."""
    files = [path for path in folder.rglob("*") if not path.is_relative_to(without) and not path.is_dir()]
    return {(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in files}


def _bomb() -> str:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(levels)


YAML_BOMBS = [
    _bomb(),
    "model: &m\n  path: *m",
    "[" * 5000,
    "{a: " * 5000,
    "- " * 5000,
    "model: !!python/object/apply:os.system ['touch outside']",
    "model: !!binary aGVsbG8=",
    "? [a, b]\n: c",
    "train: {epochs: " + "9" * 5000 + "}",
    "a: !<tag:x> b",
    "%YAML 9.9\n---\nmodel: x",
    "model: x\n---\nmodel: y",
    "model: 2001-01-01\ndata: 12:30:45",
    "<<: {model: x}",
]
JSON_BOMBS = [
    b"",
    b"\n\n\n",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"text": "' + b"a" * 10_000_000 + b'"}',
    b'{"text": "\\ud800"}',
    b'{"text": NaN}',
    b'{"text": 1' + b"0" * 10_000 + b"}",
    b'{"text": "a", "text": "b"}',
    b'{"text": "a\\u0000b"}',
    b"\x1f\x8b\x08\x00",
    b"\x00" * 1000,
    b'[{"text": "a"}]',
    b'"text"',
    b"null",
]


def _timeout(number: int, _: FrameType | None) -> None:
    raise Hang(f"takes more than {SECONDS} seconds")


def _child(options: argparse.Namespace) -> int:
    """Judges cases and prints a line for each."""
    signal.signal(signal.SIGALRM, _timeout)
    with tempfile.TemporaryDirectory() as outside:
        scratch = Path(outside) / "around" / "scratch"  # whatever a case makes with `..` is seen too
        scratch.mkdir(parents=True)
        fuzzer = Fuzzer(scratch)
        fuzzer.prepare(options.kinds)
        [kind] = options.kinds
        os.chdir(scratch)
        for number in range(options.first, options.first + options.cases):
            try:
                result = fuzzer.judge(kind, options.seed, number)
            except Wrong as wrong:
                result = f"WRONG {str(wrong).splitlines()[0][:300]}"
            print(f"{number} {result}", flush=True)
    return 0


def _outcomes(command: list[str]) -> tuple[list[str], str]:
    """What a child says of its cases, and how it ended; it is killed where a case hangs in C, out of reach of signals
    to Python."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    hung = threading.Event()
    lines = []

    def watch() -> threading.Timer:
        timer = threading.Timer(60 + 3 * SECONDS, lambda: (hung.set(), child.kill()))
        timer.start()
        return timer

    with child:
        timer = watch()
        for line in child.stdout:
            timer.cancel()
            lines.append(line.rstrip("\n"))
            timer = watch()
        timer.cancel()
        errors = child.stderr.read()
    return lines, "it hangs" if hung.is_set() else f"the process ended with {child.returncode}: {errors[-500:]}"


def _main() -> int:
    parser = argparse.ArgumentParser(description="Broken input by the thousand.")
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=["config", "data", "adapter", "gguf"])
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kinds = options.kinds or ["config", "data", "adapter", "gguf"]
    if options.child:
        return _child(options)
    wrong, counts = 0, Counter[str]()
    for kind in options.kinds:
        number, last = options.first, options.first + options.cases // len(options.kinds)
        while number < last:
            some = min(PER_PROCESS, last - number)
            command = [sys.executable, __file__, "--child", "--kinds", kind, "--seed", str(options.seed)]
            command += ["--first", str(number), "--cases", str(some)]
            lines, ending = _outcomes(command)
            if len(lines) < some:
                lines.append(f"{number + len(lines)} WRONG {ending}")
            for line in lines:
                result = line.split(" ", 2)[1]
                counts[f"{kind} {result}"] += 1
                if result == "WRONG":
                    wrong += 1
                    print(f"--seed {options.seed} --kinds {kind} --cases 1 --first {line}")
            number += len(lines)
        print(f"{kind}: {counts[f'{kind} refused']} refused, {counts[f'{kind} accepted']} accepted", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(_main())
