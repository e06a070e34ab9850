"""How fast rows are tokenized, and how much memory that takes for more of them: python benchmarks/rows.py MODEL.

Each number of rows is written to a file and read by a process of its own: tokenized into an empty cache, found there
again, and looked up as an epoch does. Seconds are the processor's; peak memory is the process's resident set, mapped
pages of files included.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STEPS = 200


def write(path: Path, rows: int, form: str) -> None:
    """Rows of 20 to 200 words, no two alike."""
    draw = random.Random(0)
    words = [line for line in Path(random.__file__).read_text().split() if line.isalpha()]
    with path.open("w") as stream:
        for number in range(rows):
            said = [" ".join(draw.choices(words, k=draw.randint(10, 100))) for _ in range(2)]
            if form == "text":
                row: dict[str, Any] = {"text": f"{number} {said[0]} {said[1]}"}
            else:
                asked = {"role": "user", "content": f"{number} {said[0]}"}
                row = {"messages": [asked, {"role": "assistant", "content": said[1]}]}
            stream.write(json.dumps(row) + "\n")


def read(path: str, model: str) -> dict[str, float]:
    """What one process measures."""
    from mlx_lora import data
    from mlx_lora.batches import train_batches
    from mlx_lora.config import Config
    from mlx_lora.model import load

    config = Config.model_validate({"model": model, "data": {"train": path}, "output_dir": "none"})
    tokenizer = load(config.model, weights=False).tokenizer
    found = {"before": _peak()}
    for name in ("tokenized", "found"):
        begin = time.process_time()
        train, _ = data.load(config.data, tokenizer)
        found[name] = time.process_time() - begin
    found["after tokenizing"] = _peak()
    batches = train_batches(config, train.examples)
    for _ in batches.steps(0, min(STEPS, batches.steps_per_epoch)):
        pass
    return found | {"after batches": _peak(), "tokens": train.tokens}


def _peak() -> float:
    """Bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Rows per second, and peak memory against the number of rows.")
    parser.add_argument("model", help="hub id, folder or .gguf file, for its tokenizer")
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 50_000], metavar="N")
    parser.add_argument("--form", choices=["messages", "text"], default="messages")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, options.model)))
        return
    table = Table(
        "rows", "MB", "tokens", "rows per CPU s", "found in", "peak before", "tokenized", "batches", title=options.form
    )
    for column in table.columns:
        column.justify = "right"
    for number in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder) / "rows.jsonl", Path(folder) / "cache"
            write(path, number, options.form)
            cache.mkdir()  # empty but for GGUF models, which are converted once
            usual = Path(os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora") / "gguf"
            if usual.is_dir():
                (cache / "gguf").symlink_to(usual)
            command = [sys.executable, __file__, options.model, "--read", str(path)]
            environment = os.environ | {"MLX_LORA_CACHE": str(cache)}
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found = json.loads(ended.stdout.splitlines()[-1])
            peaks = [f"{found[when] / 1e6:,.0f} MB" for when in ("before", "after tokenizing", "after batches")]
            size = f"{path.stat().st_size / 1e6:,.1f}"
            speed = f"{number / found['tokenized']:,.0f}"
            table.add_row(f"{number:,}", size, f"{found['tokens']:,}", speed, f"{found['found']:.2f} s", *peaks)
    Console(width=120).print(table)


if __name__ == "__main__":
    _main()
