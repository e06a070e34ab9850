"""A training step against the same step in torch with transformers and PEFT, on the same CPU.

    python benchmarks/vs_peft.py [--cases b e] [--rounds 5] [--updates 2] [--tiny] [--json FILE]

Both sides have the same weights in float32, the same adapter to start from, the same rows in every update, AdamW and
clipping with the same settings, and all cores. The peer (vs_peft_peer.py) is a process of its own, so that neither's
BLAS is in the other's way; the sides take turns update by update, with a pause, and one waits while the other computes.
Ours is compiled, and the peer is as PEFT's users run it: eager, its attention `sdpa`, its loss transformers' own.
Torch's threads wait for one another by spinning: where something else runs too, all cores can be slower than one. Two
of the untimed rounds try both, and the peer goes on with what was faster (`threads`).

Seconds are medians over rounds, each of the sum over the first updates of the case, after three untimed rounds; `ratio`
is ours over PEFT's. The losses of every update, the untimed ones too, must agree to 1e-4 relative: else the two did not
do the same work, and the program ends with exit code 2 and without figures. Memory is the growth of each process's
resident memory, at its peak in the rounds, over what it held before (weights and adapter): the same measure for both,
but not MLX's own, since it counts what allocators keep. It can be read on Linux only.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import CASES, Case, tiny  # imports mlx_lora before MLX
from our_step import Training, load, start

# isort: split
import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from mlx_lora import lora, memory, model
from mlx_lora.batches import Batch
from mlx_lora.config import AdamW
from mlx_lora.errors import InputError, exit_code

AGREEMENT = 1e-4
PAUSE = 0.1  # seconds: a BLAS's threads go on spinning for a while after a product


def measure_case(case: Case, updates: int, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of both sides, and their losses. Raises InputError where these do not agree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training = start(case, *load(case, folder, "float32"))
        chosen = training.updates(updates)
        _write(training, chosen, folder)
        peer = _Peer(folder)
        losses: dict[str, list[float]] = {"ours": [], "peft": []}

        def one_round(threads: int) -> dict[str, float]:
            seconds = {"ours": 0.0, "peft": 0.0}
            for number, update in enumerate(chosen):
                begin = time.perf_counter()
                losses["ours"].append(training.update(update).loss.item())
                seconds["ours"] += time.perf_counter() - begin
                time.sleep(PAUSE)
                answer = peer.update(number, threads)
                losses["peft"].append(answer["loss"])
                seconds["peft"] += answer["seconds"]
                time.sleep(PAUSE)
            return seconds

        try:
            gc.collect()  # models of earlier cases
            mx.clear_cache()
            held = {"ours": resident("self", reset=True), "peft": resident(peer.pid, reset=True)}
            one_round(1)
            tried = {threads: one_round(threads)["peft"] for threads in (1, os.cpu_count() or 1)}
            threads = min(tried, key=lambda threads: tried[threads])
            times = [one_round(threads) for _ in range(rounds)]
            most = {"ours": resident("self"), "peft": resident(peer.pid)}
        finally:
            peer.close()
    apart = furthest(losses["ours"], losses["peft"])
    if not apart <= AGREEMENT:
        raise InputError(
            f"case {case.name}: the losses differ by {apart:.1e} relative (ours {losses['ours']}, PEFT's "
            f"{losses['peft']}), so the two did not do the same work and nothing is printed"
        )
    seconds = {side: statistics.median(one[side] for one in times) for side in ("ours", "peft")}
    return {
        "case": case.name,
        "title": case.title,
        "updates": len(chosen),
        "seconds": seconds,
        "ratio": seconds["ours"] / seconds["peft"],
        "peft_threads": threads,
        "memory": {side: most[side] - held[side] for side in held if held[side]},
        "losses": losses,
        "loss_difference": apart,
    }


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two losses of one update, relative to the second; nan where any of them is."""
    return float(np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))


def _write(training: Training, updates: list[list[Batch]], folder: Path) -> None:
    """What the peer reads: see there."""
    options = training.options
    arrays: dict[str, np.ndarray] = {}
    for number, update in enumerate(updates):
        examples = [training.batches.examples[row] for batch in update for row in batch.rows]
        tokens = np.full((len(examples), max(example.tokens.size for example in examples)), -1, np.int32)
        supervised = np.zeros(tokens.shape, bool)
        for place, example in enumerate(examples):
            tokens[place, : example.tokens.size] = example.tokens
            supervised[place, : example.tokens.size] = example.supervised
        arrays |= {f"{number}.tokens": tokens, f"{number}.supervised": supervised}
    save_file(arrays, folder / "updates.safetensors")
    names = {"lora_a": "lora_A", "lora_b": "lora_B"}
    adapter = {}
    for name, array in training.state.adapter.items():
        path, _, side = name.rpartition(".")
        adapter[f"base_model.model.{path}.{names[side]}"] = np.ascontiguousarray(np.array(array).T)
    save_file(adapter, folder / "adapter.safetensors")
    adamw = options.train.optimizer
    assert isinstance(adamw, AdamW)
    settings = {
        "rank": options.lora.rank,
        "alpha": options.lora.alpha,
        "paths": list(lora.layers(training.network)),
        "learning_rate": options.train.learning_rate,
        "betas": adamw.betas,
        "eps": adamw.eps,
        "weight_decay": adamw.weight_decay,
        "max_grad_norm": options.train.max_grad_norm,
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


class _Peer:
    """The running process of vs_peft_peer.py."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("vs_peft_peer.py")), str(folder)]
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        quiet |= {"PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
        )
        self.pid = str(self._process.pid)
        self._answer()

    def update(self, number: int, threads: int) -> dict[str, float]:
        assert self._process.stdin is not None
        print(number, threads, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vs_peft_peer.py ended with {self._process.wait()}")
        return json.loads(line)


def resident(process: str, reset: bool = False) -> int:
    """The most bytes that a process held in memory at a time, since its start or the last reset; 0 without /proc."""
    folder = Path("/proc") / process
    if not folder.exists():
        return 0
    if reset:
        (folder / "clear_refs").write_text("5", encoding="ascii")
    lines = (folder / "status").read_text(encoding="utf-8").splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(peak.split()[1])


def measure(cases: list[Case], updates: int, rounds: int) -> dict[str, Any]:
    """All figures, and what was measured on. Raises InputError where torch or PEFT are missing."""
    missing = [name for name in ("torch", "peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the peer needs {' and '.join(missing)}: pip install '.[test]'")
    mx.set_default_device(mx.cpu)
    measured = [measure_case(case, updates, rounds) for case in cases]
    return {
        "device": model.device(),
        "mlx": mx.__version__,
        "torch": importlib.metadata.version("torch"),
        "peft": importlib.metadata.version("peft"),
        "transformers": importlib.metadata.version("transformers"),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "compiled": model.can_compile(),
        "cases": measured,
    }


def table(figures: dict[str, Any]) -> str:
    """Aligned columns under the names of the device and of the versions."""
    compiled = "compiled" if figures["compiled"] else "not compiled"
    lines = [
        f"{figures['device']}, mlx {figures['mlx']} ({compiled}); torch {figures['torch']}, PEFT {figures['peft']}, "
        f"transformers {figures['transformers']}; float32, {figures['cores']} cores",
        *(f"{case['case']}: {case['title']}; {case['updates']} updates" for case in figures["cases"]),
        "",
        f"{'':4} {'ours s':>9} {'PEFT s':>9} {'threads':>7} {'ratio':>7} {'ours MiB':>9} {'PEFT MiB':>9} "
        f"{'last losses':>19} {'apart':>8}",
    ]
    for case in figures["cases"]:
        seconds, losses = case["seconds"], case["losses"]
        memory = [f"{case['memory'][side] / 2**20:.0f}" if side in case["memory"] else "-" for side in ("ours", "peft")]
        lines.append(
            f"{case['case']:4} {seconds['ours']:9.4f} {seconds['peft']:9.4f} {case['peft_threads']:7} "
            f"{case['ratio']:7.3f} {memory[0]:>9} {memory[1]:>9} {losses['ours'][-1]:9.6f} {losses['peft'][-1]:9.6f} "
            f"{case['loss_difference']:8.1e}"
        )
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step against torch and PEFT on the same CPU.")
    names = [name for name, case in CASES.items() if case.bits is None and name != "long"]  # PEFT has no 4 bits here
    parser.add_argument("--cases", nargs="+", choices=names, default=["b", "e"], metavar="CASE", help="of a b c e")
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    parser.add_argument("--updates", type=int, default=2, help="first updates of a case that make up a round")
    parser.add_argument("--tiny", action="store_true", help="narrow models and short rows: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    chosen = [tiny(CASES[name]) if options.tiny else CASES[name] for name in options.cases]
    with memory.limits(memory.available()):  # as in training
        figures = measure(chosen, options.updates, options.rounds)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(_main))
