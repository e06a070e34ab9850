"""Checkpoints: everything that a resume needs, in a folder that is complete or absent.

checkpoints/00000200/adapters.safetensors, adapter_config.json    the adapter, loadable by mlx-lm as it is
                     best.safetensors                             the best adapter so far, if there is one
                     optimizer.safetensors                        the optimizer's state
                     progress.json                                step, losses, best so far, the run's settings
                     manifest.json                                size and sha256 of the others
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import adapter_files, files
from mlx_lora.adapter_files import mlx_form
from mlx_lora.adapter_files.reading import fitting_arrays
from mlx_lora.config import PLANNED
from mlx_lora.errors import InputError
from mlx_lora.optim import flatten_state, restore_state
from mlx_lora.step import State

OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"
# Of the training options, those that change how an update is computed, not which rows it holds.
COMPUTED = (*PLANNED, "prefix_cache", "prefix_cache_limit", "memory_limit")

Saved = tuple[dict[str, mx.array], dict[str, str]]  # an adapter and its metadata


@dataclass
class Progress:
    """Where a run stands after `step` updates. What is not here is a function of the config, the data and `step`."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    loss: float | None = None  # of the last update
    valid_loss: float | None = None  # of the last evaluation
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    finished: bool = False
    since_report: dict[str, float] = field(default_factory=dict)  # sums that the next report goes on from


def save(
    run: Path,
    state: State,
    best: Saved | None,
    progress: Progress,
    settings: dict[str, Any],
    contract: dict[str, Any],
    metadata: dict[str, str],
    keep: int,
) -> Path:
    """Writes the checkpoint of `progress.step` and removes all but the newest `keep`.

    `contract` is what a resumed run must find unchanged; see `check`.
    """
    folder = run / adapter_files.CHECKPOINTS / f"{progress.step:08d}"
    with files.new_folder(folder, replace=True) as temporary:  # the same checkpoint of an earlier try
        mlx_form.save(temporary, state.adapter, settings, metadata)
        mx.save_safetensors(str(temporary / OPTIMIZER), flatten_state(state.optimizer))
        if best is not None:
            mx.save_safetensors(str(temporary / BEST), *best)
        files.write_json(temporary / PROGRESS, {"progress": asdict(progress), "contract": contract})
        manifest = {
            path.name: {"size": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        files.write_json(temporary / MANIFEST, manifest)
    # Those of later steps are damaged ones that a resume passed over: they are no reason to remove good ones.
    for old in [path for path in complete(run) if path <= folder][:-keep]:
        files.remove_folder(old)
    return folder


def complete(run: Path) -> list[Path]:
    """The run's checkpoints with a manifest, oldest first."""
    return sorted(path.parent for path in (run / adapter_files.CHECKPOINTS).glob(f"[0-9]*/{MANIFEST}"))


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what its manifest says, and a line for each newer one that is not."""
    complaints = []
    for folder in reversed(complete(run)):
        if fault := _fault(folder):
            complaints.append(f"{folder}: {fault}; passed over")
        else:
            return folder, complaints
    return None, complaints


def read_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The progress and the contract of a checkpoint."""
    content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return Progress(**content["progress"]), content["contract"]


def restore(folder: Path, initial: State) -> tuple[State, Saved | None]:
    """The state of a checkpoint and the best adapter until then; `initial` gives names, shapes and types.

    Raises InputError where they differ.
    """
    best = None
    if (folder / BEST).exists():
        _, metadata = mx.load(str(folder / BEST), return_metadata=True)
        best = fitting_arrays(folder / BEST, initial.adapter), metadata
    adapter = fitting_arrays(folder / mlx_form.WEIGHTS, initial.adapter)
    optimizer = fitting_arrays(folder / OPTIMIZER, flatten_state(initial.optimizer))
    return State(adapter, restore_state(initial.optimizer, optimizer)), best


def check(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Raises InputError naming every difference between the run's settings at the checkpoint and now.

    Other versions of the libraries are no error, since nobody can be asked to go back, and neither are other ways to
    compute an update, which may be what saves a run: they are returned as notes.
    """
    if then.get("order") != now["order"]:
        raise InputError(
            f"{folder}: cannot be resumed: it was written by an mlx_lora that ordered rows otherwise; "
            "start a new run in another output_dir"
        )
    notable = _differences(_notable(then), _notable(now))
    differences = _differences(_binding(then), _binding(now))
    if differences:
        differences += _differences({"model.revision": then.get("revision")}, {"model.revision": now["revision"]})
        raise InputError(
            "\n       ".join(
                [
                    f"{folder}: cannot be resumed, because the run would not be the same:",
                    *differences,
                    "set these back, or start a new run in another output_dir",
                ]
            )
        )
    return [f"{difference}: the rest of the run may differ in the last digits" for difference in notable]


def _notable(contract: dict[str, Any]) -> dict[str, Any]:
    train = contract.get("train") or {}
    return {"versions": contract.get("versions"), "train": {name: train.get(name) for name in COMPUTED}}


def _binding(contract: dict[str, Any]) -> dict[str, Any]:
    train = {name: value for name, value in (contract.get("train") or {}).items() if name not in COMPUTED}
    return contract | {"versions": None, "revision": None, "train": train}


def _differences(then: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            line
            for key in list(dict.fromkeys([*then, *now]))
            for line in _differences(then.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if then == now else [f"{prefix}: was {json.dumps(then)}, is {json.dumps(now)}"]


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"] or files.sha256(path) != expected["sha256"]:
                return f"{name} is damaged"
        if missing := {mlx_form.WEIGHTS, mlx_form.SETTINGS, OPTIMIZER, PROGRESS} - manifest.keys():
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({error})"
    return None
