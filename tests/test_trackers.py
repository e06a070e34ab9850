"""TensorBoard and Weights & Biases: what their own readers read is what the run measured."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest

from mlx_lora import finetune, metrics
from mlx_lora.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:wandb.*", "ignore::DeprecationWarning:tensorboard.*"
)


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> dict:
    rows = tmp_path_factory.mktemp("trackers") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Row {n}. " * (1 + n % 5)}) + "\n" for n in range(40)))
    return {
        "model": str(tiny_model),
        "data": {"train": str(rows), "valid": 0.2},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"epochs": None, "max_steps": 8, "learning_rate": 0.01},
        "eval": {"every": 4, "samples": ["Row"], "sample_tokens": 4},
        "checkpoint": {"every": 4},
        "log": {"every": 2},
    }


def reporting(options: dict, run: Path, *names: str) -> dict:
    return options | {"output_dir": str(run), "log": {"every": 2, "report_to": list(names)}}


def measured(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every figure, from metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for _, event in metrics.events(run / metrics.FILE):
        if event["event"] in ("train", "eval"):
            for name in event.keys() - {"event", "step", "time", "best"}:
                found.setdefault(f"{event['event']}/{name}", []).append((event["step"], event[name]))
    return found


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def in_tensorboard(run: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[str]]]:
    """Scalars and texts by tag, as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.util import tensor_util

    reader = EventMultiplexer({"run": str(run / "tensorboard")}).Reload()
    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, list[str]] = {}
    for tag in reader.Runs()["run"]["tensors"]:
        found = [(event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in reader.Tensors("run", tag)]
        if reader.SummaryMetadata("run", tag).plugin_data.plugin_name == "scalars":
            scalars[tag] = [(step, float(value)) for step, value in found]
        else:
            texts[tag] = [value.item().decode() for _, value in found]
    return scalars, texts


def test_tensorboard_reads_every_figure(options, tmp_path):
    finetune(reporting(options, tmp_path / "run", "tensorboard"))
    scalars, texts = in_tensorboard(tmp_path / "run")
    expected = measured(tmp_path / "run")
    assert scalars.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in scalars[tag]] == [step for step, _ in points]
        assert [value for _, value in scalars[tag]] == pytest.approx([value for _, value in points], rel=1e-6)
    samples = [event for _, event in metrics.events(tmp_path / "run" / metrics.FILE) if event["event"] == "sample"]
    assert texts["sample/Row"] == [f"base: {event['base']}\n\ntuned: {event['answer']}" for event in samples]
    assert any("padding efficiency" in text for text in texts["events/note"])


def test_tensorboard_shows_a_resumed_run_once(options, tmp_path):
    """Of a run that was killed after step 6, whose last checkpoint was that of step 4."""
    run = tmp_path / "run"
    changed = reporting(options, run, "tensorboard")
    finetune(changed)
    (run / "checkpoints" / "00000008").rename(tmp_path / "lost")
    finetune(changed, resume=True)
    scalars, _ = in_tensorboard(run)
    for tag, points in measured(run).items():
        assert [step for step, _ in scalars[tag]] == [step for step, _ in points]
        assert [value for _, value in scalars[tag]] == pytest.approx([value for _, value in points], rel=1e-6)


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


def in_wandb(run: Path) -> list:
    """The records of the one offline run, read from its file: LevelDB's log format around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = (run / "wandb").glob("offline-run-*/*.wandb")
    content, place, parts, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_has_every_figure(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    finetune(reporting(options, run, "wandb"))
    records = in_wandb(run)
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if isinstance(value, float | int) and name.startswith(("train/", "eval/")):
                    found.setdefault(name, []).append((items["step"], value))
    assert found == measured(run)
    [began] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    start = next(event for _, event in metrics.events(run / metrics.FILE) if event["event"] == "start")
    assert (began.run_id, began.display_name, began.project) == (start["id"], "run", "mlx_lora")
    config = {item.key: json.loads(item.value_json) for item in began.config.update}
    assert config["train"]["learning_rate"] == 0.01
    assert next(record for record in records if record.WhichOneof("record_type") == "exit").exit.exit_code == 0


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_done(options, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(InputError, match=rf'log\.report_to: {name} is not installed; pip install "mlx-lora\[{name}\]"'):
        finetune(reporting(options, tmp_path / "run", name))
    assert not (tmp_path / "run").exists()


def test_training_goes_on_where_nothing_can_be_reported(options, tmp_path, run_command):
    """A file where TensorBoard's folder would be, and W&B without a login."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("mine")
    (tmp_path / "my.yaml").write_text(json.dumps(reporting(options, run, "tensorboard", "wandb")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    ended = run_command("train", "--config", tmp_path / "my.yaml", env=environment | {"HOME": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    assert "done: 8 steps" in ended.stdout
    assert "warning: log.report_to: tensorboard: " in ended.stdout
    assert "warning: log.report_to: wandb: No API key configured" in ended.stdout
    assert (run / "tensorboard").read_text() == "mine"
