"""The config: what is accepted, what is refused and in which words, and that no option is without effect."""

import json
from pathlib import Path

import pytest
import yaml

from mlx_lora import config, config_file
from mlx_lora.config import Config
from mlx_lora.errors import InputError

ROOT = Path(__file__).parents[1]
MINIMAL = "model: some/model\ndata: {train: rows.jsonl}\noutput_dir: run\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        config_file.load(path, list(overrides))
    return str(caught.value)


def test_minimal_config_is_the_defaults_of_the_design(write):
    loaded = config_file.load(write(MINIMAL))
    assert loaded.model.path == "some/model"
    assert (loaded.lora.rank, loaded.lora.alpha, loaded.lora.target_modules, loaded.lora.layers) == (
        16,
        32.0,
        "all-linear",
        "all",
    )
    assert loaded.train.learning_rate == 1e-4
    assert loaded.train.optimizer == config.AdamW(weight_decay=0.01, betas=[0.9, 0.999])
    assert loaded.train.schedule == config.Schedule(name="cosine", warmup=0.03, min_lr=1e-6)
    assert (loaded.eval.every, loaded.log.every) == (200, 10)
    assert (loaded.checkpoint.every, loaded.checkpoint.keep) == ("auto", 3)


def test_numbers_without_a_dot_are_numbers(write):
    assert config_file.load(write(MINIMAL + "train: {learning_rate: 1e-4}")).train.learning_rate == 1e-4
    assert config_file.load(write(MINIMAL), ["train.learning_rate=2E-4"]).train.learning_rate == 2e-4


def test_overrides_apply_in_order_and_reach_into_short_forms(write):
    loaded = config_file.load(
        write(MINIMAL),
        ["train.seed=1", "train.seed=2", "model.dtype=bfloat16", "lora.target_modules=[q_proj, v_proj]"],
    )
    assert loaded.train.seed == 2
    assert (loaded.model.path, loaded.model.dtype) == ("some/model", "bfloat16")
    assert loaded.lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("more", "line", "words"),
    [
        ("train: {lerning_rate: 1}", 4, ["train.lerning_rate", "unknown key", "did you mean learning_rate?"]),
        ("lora:\n  ranks: 8", 5, ["lora.ranks", "did you mean rank?"]),
        ("rank: 8", 4, ["rank", "did you mean lora.rank?"]),
        ("learning_rate: 1e-4", 4, ["did you mean train.learning_rate?"]),
        ("train: {optimizer: {name: sgd, betas: [0.9, 0.9]}}", 4, ["train.optimizer.betas", "unknown key"]),
        ("train: {optimizer: {name: adamx}}", 4, ["train.optimizer", "'adamw'", "'adamx'"]),
        ("train: {epochs: 0}", 4, ["train.epochs", "greater than or equal to 1", "got 0"]),
        ("train: {epochs: three}", 4, ["train.epochs", "integer", 'got "three"']),
        ("train: {batch_size: true}", 4, ["train.batch_size", "integer", "got true"]),
        ("train: {epochs: null}", 4, ["train needs epochs or max_steps"]),
        ("train: {schedule: {min_lr: 1.0}}", 4, ["min_lr", "above train.learning_rate"]),
        ("train: {schedule: {warmup: 1.5}}", 4, ["train.schedule.warmup", "whole number of steps"]),
        ("lora: {rank: 0}", 4, ["lora.rank"]),
        ("lora: {dropout: 1.0}", 4, ["lora.dropout"]),
        ("lora: {layers: top}", 4, ["lora.layers", "last:N"]),
        ("lora: {layers: [-1]}", 4, ["lora.layers"]),
        ("lora: {target_modules: ['re:(']}", 4, ["lora.target_modules", "regular expression"]),
        ("lora: {target_modules: []}", 4, ["lora.target_modules"]),
        ("lora: {alpha: .inf}", 4, ["lora.alpha"]),
        ("lora: {alpha: .nan}", 4, ["lora.alpha"]),
        ("notes: {run: 3}", 4, ["notes.run", "string"]),
        ("eval: [1]", 4, ["eval"]),
    ],
)
def test_faults_name_line_key_value_and_cure(write, more, line, words):
    path = write(MINIMAL + more)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    for word in words:
        assert word in message


def test_every_fault_is_listed_at_once(write):
    message = refusal(write(MINIMAL + "lora: {rank: 0, alpha: -1}\ntrain: {seed: -1}"))
    assert all(key in message for key in ("lora.rank", "lora.alpha", "train.seed"))


def test_missing_options_are_named(write):
    message = refusal(write("lora: {rank: 4}"))
    assert all(f"{key}: is required" in message for key in ("model", "data", "output_dir"))


@pytest.mark.parametrize("override", ["train.sead=1", "train.seed=x", "train.seed", "=3", "train.seed.deep=1", "a=[1"])
def test_faulty_overrides_are_named(write, override):
    assert f"--set {override}" in refusal(write(MINIMAL), override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a\nmodel: b\n", ["my.yaml:2", "'model' stands twice"]),
        ("model: [a\n", ["my.yaml:2", "not valid YAML"]),
        ("a: &x [*x]\nb: !!python/object:os.system x", ["not valid YAML"]),
        ("- 1\n", ["holds no options"]),
        ("", ["holds no options"]),
        ("eval: {early_stopping: 2}\n" + MINIMAL.replace("{train", "{valid: 0, train"), ["needs validation rows"]),
    ],
)
def test_faulty_files_are_named(write, text, words):
    message = refusal(write(text))
    for word in words:
        assert word in message


def test_unreadable_files_are_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "UTF-8" in refusal(tmp_path / "latin.yaml")


def test_dump_is_read_back_to_an_equal_config(write):
    loaded = config_file.load(
        write(MINIMAL), ["train.optimizer.name=lion", "model.quantize={bits: 8}", "notes.a='x: y'"]
    )
    assert config_file.load(write(config_file.dump(loaded))) == loaded


def test_commented_options_are_read_back(write):
    loaded = config_file.load(write(MINIMAL), ["model.quantize={bits: 8}", "notes.a='x: # y\n'", "data.train='# rows'"])

    def flat(group: dict, prefix: str = "") -> dict:
        options = {}
        for key, value in group.items():
            inner = isinstance(value, dict) and key not in ("quantize", "notes")
            options |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
        return options

    options = flat(loaded.model_dump())
    assert config_file.parse(config_file.nested(options)) == loaded
    text = config_file.commented(["a: b", ""], {key: (value, "c: [") for key, value in options.items()})
    assert text.startswith("# a: b\n#\nmodel:\n  path: some/model  # c: [\n")
    assert config_file.load(write(text)) == loaded


def test_a_config_of_python_values_is_left_as_it_was():
    raw = yaml.safe_load(MINIMAL)
    config_file.parse(raw, ["train.seed=4"])
    assert raw == yaml.safe_load(MINIMAL)


def test_reference_file_is_printed_from_the_declarations():
    assert (ROOT / "configs" / "reference.yaml").read_text() == config_file.reference()


def test_reference_file_holds_the_defaults():
    loaded = config_file.load(ROOT / "configs" / "reference.yaml")
    assert loaded == config_file.parse(
        {"model": "Qwen/Qwen3-0.6B", "data": {"train": "data/train.jsonl"}, "output_dir": "runs/my-first"}
    )


def test_schema_file_is_printed_from_the_declarations():
    assert (ROOT / "configs" / "schema.json").read_text() == config_file.schema()
    schema = json.loads(config_file.schema())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)


def test_readme_holds_the_table_of_options():
    assert config_file.table() in (ROOT / "README.md").read_text()


def test_every_option_says_what_it_means():
    assert all(field.description for keys, field, _ in config.walk() if keys[-1] != "name")
