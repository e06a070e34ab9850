"""What `mlx_lora.plan` says from config.json alone, against the peaks of real runs, each in a process of its own."""

import json
import multiprocessing
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_lora import finetune, metrics, plan
from mlx_lora.errors import InputError

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
# (family, its shape, options, characters of each row's prompt and answer): a byte is a token
CASES: dict[str, tuple[str, dict[str, Any], list[str], tuple[int, int]]] = {
    "Llama, tied, prompts masked": ("llama", {"vocab_size": 8000}, [], (180, 60)),
    "Qwen2, untied, rank 64, nothing recomputed, all supervised": (
        "qwen2",
        {"vocab_size": 4000, "tie_word_embeddings": False},
        ["lora.rank=64", "train.gradient_checkpointing=false", "data.loss_on=all"],
        (120, 120),
    ),
    "Qwen3, all recomputed": ("qwen3", {"vocab_size": 2000}, ["train.gradient_checkpointing=true"], (100, 140)),
    "Llama, base of 4 bits, MLPs recomputed": (
        "llama",
        {"vocab_size": 8000, "num_hidden_layers": 3},
        ["model.quantize={bits: 4}", "train.gradient_checkpointing=mlp"],
        (20, 60),
    ),
    "Llama, one long row": (
        "llama",
        {"vocab_size": 2000, "num_hidden_layers": 3},
        ["train.batch_size=1", "data.max_seq_length=1500"],
        (200, 1400),
    ),
    "Qwen2, queries and values, large vocabulary": (
        "qwen2",
        {"vocab_size": 49152},
        ["lora.target_modules=[q_proj, v_proj]", "lora.rank=8"],
        (20, 200),
    ),
    "Llama, dropout, two batches an update, upper blocks": (
        "llama",
        {"vocab_size": 2000},
        ["lora.dropout=0.1", "train.gradient_accumulation_steps=2", "lora.layers=last:3", "lora.rank=32"],
        (100, 140),
    ),
    "Qwen3, every second block, short rows, rank 256": (
        "qwen3",
        {"vocab_size": 512},
        ["lora.rank=256", "train.gradient_checkpointing=2", "train.batch_size=2"],
        (4, 8),
    ),
}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have nothing but imports behind them: so these are made once, and no memory is used yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlx_lora.train"])
    return context


def settings_of(family: str, shape: dict[str, Any]) -> dict[str, Any]:
    """A config.json."""
    model = tiny.BUILDERS[family](**{**SHAPE, **shape})
    return {name: value for name, value in vars(model.args).items() if value is not None} | {"torch_dtype": "float32"}


def write_model(folder: Path, tokenizer: Path | None, family: str, shape: dict[str, Any], weights: bool) -> Path:
    if tokenizer is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (folder / "config.json").write_text(json.dumps(settings_of(family, shape)))
    if weights:
        model = tiny.BUILDERS[family](**{**SHAPE, **shape})
        mx.save_safetensors(
            str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
        )
    return folder


def write_rows(path: Path, characters: tuple[int, int], number: int = 12) -> Path:
    prompt, answer = characters
    row = {"prompt": "a" * prompt, "completion": "b" * answer}
    path.write_text((json.dumps(row) + "\n") * number)
    return path


def write_config(folder: Path, model: Path | str) -> Path:
    path = folder / "run.yaml"
    options = {"valid": 0, "train": str(folder / "rows.jsonl")}
    text = {"model": str(model), "data": options, "log": {"every": 1}, "output_dir": str(folder / "run")}
    path.write_text(json.dumps(text))
    return path


def planned(capsys: Any, monkeypatch: Any, config: Path, *options: str) -> tuple[dict[str, Any], int]:
    """What the command prints with --json, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["plan", str(config), "--json", *options])
    capsys.readouterr()
    code = 0
    try:
        plan._main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return json.loads(capsys.readouterr().out), code


def measured(processes: Any, config: Path, options: list[str]) -> int:
    """The peak that a run of three steps reports, in a process of its own."""
    process = processes.Process(target=finetune, args=(config, ["train.max_steps=3", *options]))
    process.start()
    process.join()
    assert process.exitcode == 0
    events = [event for _, event in metrics.events(config.parent / "run" / metrics.FILE)]
    return max(event["peak_memory"] for event in events if event["event"] == "train")


on_cpu = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="counted for a CPU")


@on_cpu
@pytest.mark.parametrize(
    "case", [*list(CASES)[:6], *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[6:])]
)
def test_the_peak_is_that_of_a_real_run(case, tiny_model, tmp_path, processes, capsys, monkeypatch):
    family, shape, options, characters = CASES[case]
    write_rows(tmp_path / "rows.jsonl", characters)
    overrides = [word for option in options for word in ("--set", option)]

    without = write_model(tmp_path / "without", tiny_model, family, shape, weights=False)
    facts, code = planned(capsys, monkeypatch, write_config(tmp_path, without), *overrides)
    assert code == 0
    assert facts["assumed"] is None

    config = write_config(tmp_path, write_model(tmp_path / "with", tiny_model, family, shape, weights=True))
    peak = measured(processes, config, options)
    print(f"{case}: {facts['bytes']['peak'] / 1e6:.1f} MB planned, {peak / 1e6:.1f} measured")
    assert facts["bytes"]["peak"] == pytest.approx(peak, rel=0.15)
    # beyond what is always there too: a base that is most of the memory would hide much
    held = sum(facts["bytes"][name] for name in ("weights", "adapter", "optimizer"))
    assert facts["bytes"]["peak"] - held == pytest.approx(peak - held, rel=0.25)


@on_cpu
def test_an_evaluation_of_long_rows_is_the_peak(tiny_model, tmp_path, processes, capsys, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", (10, 20))
    valid = f"data.valid={write_rows(tmp_path / 'valid.jsonl', (100, 1400), 4)}"
    config = write_config(tmp_path, write_model(tmp_path / "model", tiny_model, "llama", {}, weights=True))
    need = planned(capsys, monkeypatch, config, "--set", valid)[0]["bytes"]
    assert need["evaluation"] > 2 * max(need["kept"] + max(need["backward"], need["logits"]), need["update"])
    peak = measured(processes, config, [valid])
    print(f"{need['peak'] / 1e6:.1f} MB planned, {peak / 1e6:.1f} measured")
    assert need["peak"] == pytest.approx(peak, rel=0.15)


@on_cpu
@pytest.mark.slow
def test_the_smallest_change_that_would_fit_fits(tiny_model, tmp_path, processes, capsys, monkeypatch):
    """The changed run takes no more than the limit under which it was suggested, to what is counted."""
    write_rows(tmp_path / "rows.jsonl", (150, 350))
    config = write_config(tmp_path, write_model(tmp_path / "model", tiny_model, "llama", {}, weights=True))
    whole = planned(capsys, monkeypatch, config)[0]["bytes"]["peak"]
    limit = f"train.memory_limit={0.5 * whole / 1e9:.6f}"
    change = planned(capsys, monkeypatch, config, "--set", limit)[0]["this_machine"]["change"]
    assert change.startswith("train.batch_tokens=")
    assert measured(processes, config, change.split(", ")) < 0.5 * 1.15 * whole


# ---- the prefix cache ------------------------------------------------------------------------------------------------


def test_a_prefix_cache_in_memory_is_counted_and_can_go_to_a_file(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", {}, weights=False))
    write_rows(tmp_path / "rows.jsonl", (100, 201), 50)
    upper = ("--set", "lora.layers=last:2")
    need = {}
    for where in ("memory", "disk", "never"):
        facts, _ = planned(capsys, monkeypatch, config, *upper, "--set", f"train.prefix_cache={where}")
        need[where] = facts["bytes"]["prefix"]
    tokens = -(-301 // 3) - 1  # inputs: all of a row but its last token
    assert need == {"memory": 50 * tokens * SHAPE["hidden_size"] * 4, "disk": 0, "never": 0}

    options = (*upper, "--set", "train.prefix_cache=memory")
    whole = planned(capsys, monkeypatch, config, *options)[0]["bytes"]["peak"]
    limit = f"train.memory_limit={(whole - 1000) / 1e9:.6f}"
    facts, code = planned(capsys, monkeypatch, config, *options, "--set", limit)
    assert (facts["this_machine"]["change"], code) == ("train.prefix_cache=disk", 1)


# ---- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["rows.jsonl", "hub:someone/rows"])
def test_without_rows_the_longest_are_assumed(train, tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", {"vocab_size": 500}, weights=False))
    options = ("--set", f"data.train={train}", "--set", "data.max_seq_length=301")
    facts, code = planned(capsys, monkeypatch, config, *options)
    assert (facts["largest_batch"], code) == ([4, 304], 0)  # a multiple of 8
    assert facts["assumed"] == f"every row has 301 tokens (data.max_seq_length), since {train} is not on this machine"

    facts, _ = planned(capsys, monkeypatch, config, *options[:2], "--set", "data.max_seq_length=1000000000")
    assert facts["largest_batch"] == [4, SHAPE["max_position_embeddings"]]
    assert "4096 tokens (the model's context)" in facts["assumed"]


def test_without_a_tokenizer_lengths_are_assumed(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", {"vocab_size": 500}, weights=False))
    write_rows(tmp_path / "rows.jsonl", (100, 200))
    facts, _ = planned(capsys, monkeypatch, config)
    assert facts["rows"] == 12
    assert 96 <= facts["largest_batch"][1] <= 112  # 300 characters, 3 a token
    assert "the tokenizer is not on this machine" in facts["assumed"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "it has no config.json"),
        ("{", "config.json cannot be read"),
        ("{}", "names no model_type"),
        ('{"model_type": "abacus"}', "abacus"),
        ('{"model_type": "llama"}', "cannot be loaded"),
        (json.dumps(settings_of("llama", {}) | {"hidden_size": 10**9}), "no array can be as large"),
    ],
)
def test_a_config_json_that_cannot_be_used_is_an_error(settings, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    if settings is not None:
        (tmp_path / "model" / "config.json").write_text(settings)
    write_rows(tmp_path / "rows.jsonl", (10, 10))
    with pytest.raises(InputError, match=f"model: .*{said}"):
        planned(capsys, monkeypatch, write_config(tmp_path, tmp_path / "model"))


def test_rows_of_a_wrong_form_are_an_error(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", {}, weights=False))
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1"):
        planned(capsys, monkeypatch, config)


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one small file, and notes what is asked for."""

    asked: list[str]
    config: bytes

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        found = self.path.endswith("/config.json")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.config)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path.endswith("/config.json"):
            self.wfile.write(self.config)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"asked": [], "config": json.dumps(settings_of("llama", {})).encode()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_of_a_hub_id_config_json_alone_is_fetched(hub, tmp_path, run_command):
    address, handler = hub
    config = write_config(tmp_path, "someone/some-model")
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    ended = run_command("plan", config, "--json", env=environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["bytes"]["weights"] > 0
    asked = [path for path in handler.asked if "some-model" in path]  # the hub's library asks for other things too
    assert {path.rsplit("/", 1)[-1] for path in asked} == {"config.json"}
    assert [path.name for path in (tmp_path / "cache").rglob("*.json")] == ["config.json"]

    ended = run_command("plan", write_config(tmp_path, tmp_path / "nowhere"), env=environment)
    assert ended.returncode == 2
    assert "error: model" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_a_change_is_suggested_and_fits(tmp_path, capsys, monkeypatch):
    """As it is said, so it is counted: the run with the change takes no more than the limit, for every limit."""
    shape = {"vocab_size": 4000, "num_hidden_layers": 8}
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", shape, weights=False))
    rows = ("--set", "data.max_seq_length=513")
    whole = planned(capsys, monkeypatch, config, *rows)[0]["bytes"]["peak"]
    seen = set()
    for share in (1.0, 0.8, 0.5, 0.35, 0.2, 0.15, 0.12, 0.01):
        limit = share * whole / 1e9 + 1e-6
        facts, code = planned(capsys, monkeypatch, config, *rows, "--set", f"train.memory_limit={limit:.6f}")
        change = facts["this_machine"]["change"]
        assert code == (0 if share == 1.0 else 1)
        assert (change == "") == (share == 1.0)
        assert (change is None) == (share == 0.01)
        if change:
            words = [word for part in change.split(", ") for word in ("--set", part)]
            changed, code = planned(
                capsys, monkeypatch, config, *rows, *words, "--set", f"train.memory_limit={limit:.6f}"
            )
            assert changed["bytes"]["peak"] <= limit * 1e9
            assert code == 0
            seen |= {part.split("=")[0] for part in change.split(", ")}
    assert seen >= {"train.batch_tokens", "train.gradient_checkpointing", "model.quantize", "data.max_seq_length"}


def test_what_train_plan_auto_changes_by_itself_is_no_change(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", {}, weights=False))
    whole = planned(capsys, monkeypatch, config)[0]["bytes"]["peak"]
    for plan_option, expected in (("auto", 0), ("manual", 1)):
        options = ("--set", f"train.plan={plan_option}", "--set", f"train.memory_limit={0.5 * whole / 1e9:.6f}")
        facts, code = planned(capsys, monkeypatch, config, *options)
        assert code == expected
        assert (facts["this_machine"]["change"] == "") == (plan_option == "auto")


def test_machines_with_more_memory_need_no_greater_change(tmp_path, capsys, monkeypatch):
    shape = {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", shape, weights=False))
    facts, _ = planned(capsys, monkeypatch, config, "--device", "gpu", "--set", "model.dtype=bfloat16")
    assert facts["bytes"]["weights"] == 2 * 8_030_261_248  # as published, 8.03 billion parameters
    changes = [fit["change"] for fit in facts["machines"]]
    assert changes[0] is None
    assert changes[-1] == ""
    assert "model.quantize={bits: 4}" in changes[1]
    assert [fit["gigabytes"] for fit in facts["machines"]] == [8, 16, 24, 32, 64, 128]


def test_the_table_is_for_a_person(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "qwen3", {}, weights=False))
    monkeypatch.setattr(sys, "argv", ["plan", str(config)])
    monkeypatch.setenv("COLUMNS", "80")
    plan._main()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for words in ("weights", "adapter", "optimizer (adamw)", "activations", "logits", "peak", "128 GB", "fits"):
        assert words in text
    assert "this machine" in text


# ---- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_a_probe_says_which_weights_it_used(weights, tiny_model, tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", (20, 40))
    model = write_model(tmp_path / "model", tiny_model, "llama", {"vocab_size": 512, "num_hidden_layers": 2}, weights)
    config = write_config(tmp_path, model)
    found = planned(capsys, monkeypatch, config, "--probe")[0]["probe"]
    assert found["random_weights"] == (not weights)
    assert 0 < found["seconds"] < found["epoch_seconds"]


def test_a_probe_of_what_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, write_model(tmp_path / "model", None, "llama", {}, weights=False))
    with pytest.raises(InputError, match="--probe: the run does not fit"):
        planned(capsys, monkeypatch, config, "--probe", "--set", "train.memory_limit=0.001")
