"""What the README and the configs folder promise is run as it stands."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from mlx_lora import config, config_file, finetune, gguf_model, plan
from mlx_lora.model import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
START = {"python": [sys.executable], "mlx-lora": [sys.executable, "-m", "mlx_lora"]}
# What sets the project up: done before these tests run, or (the quickstart) run by a test of its own.
SET_UP = {"./scripts/quickstart.sh", "./scripts/test.sh", "pip install .", "pip install '.[serve]'"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [command for line in lines if (command := shlex.split(line, comments=True))]


def assert_it_serves(command: list[str], folder: Path) -> None:
    """It says where, answers there, and ends when it is told to."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(line for line in server.stdout if "http://" in line).split()[-1]
            with urllib.request.urlopen(f"{address}/models", timeout=60) as answer:
                assert b'"long"' in answer.read()
        finally:
            server.terminate()
        assert server.wait(60) == 143


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """A folder with the README's files, and the model's hub id as a local folder with a tiny model in it."""
    folder = tmp_path_factory.mktemp("readme")
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(content)
    model = folder / config_file.load(folder / "my.yaml").model.path
    model.parent.mkdir()
    model.symlink_to(tiny_model)
    return folder


def test_every_command_of_the_readme_works_in_its_order(folder):
    for command in commands():
        if shlex.join(command) in SET_UP:
            continue
        program, *arguments = command
        start = START.get(program, [sys.executable, "-m", *program.split(".")])
        if "mlx_lora.serve" in arguments:
            assert_it_serves([*start, *arguments, "--port", "0"], folder)
            continue
        ended = subprocess.run([*start, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout}\n{ended.stderr}"
    for block in blocks("python"):
        ended = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1].count(" ") == 5


def test_the_readme_starts_with_the_two_scripts():
    assert [command[0] for command in commands()[:2]] == ["./scripts/quickstart.sh", "./scripts/test.sh"]
    assert {shlex.join(command) for command in commands()} >= SET_UP
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_names_every_module():
    for path in (ROOT / "mlx_lora").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"^ .*\b{re.escape(path.name)}\b", README, re.MULTILINE), path


ROWS = {  # for the configs whose rows are not in the repository
    "completion": {"prompt": "Number {}?", "completion": "{} it is."},
    "text": {"text": "This is text number {}."},
    "tools": {
        "messages": [
            {"role": "user", "content": "Light {}, please"},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "light", "arguments": {"room": "{}"}}}],
            },
            {"role": "tool", "content": "on"},
            {"role": "assistant", "content": "Light {} is on."},
        ],
        "tools": [{"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}],
    },
}
WITH_TOOLS = (
    "{{ tools | tojson }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a template that writes tools, as a folder and as a GGUF file in it."""
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(WITH_TOOLS)
    gguf_model.write(folder / "model.gguf", load(config.Model(path=str(folder))), None, "f32")
    return folder


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_trains(path, with_tools, tmp_path, monkeypatch):
    """Two steps on a tiny model of its kind (a GGUF file, a base of 4 bits), with rows of the kind that it is for."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    rows = (ROOT / "configs" / "quickstart.jsonl").read_text().splitlines()[:40]
    if path.stem in ROWS:
        rows = [json.dumps(ROWS[path.stem]).replace("{}", str(number)) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    base = with_tools / "model.gguf" if str(config_file.load(path).model.path).endswith(".gguf") else with_tools
    changes = {"model.path": base, "data.train": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run"}
    changes |= {"lora.layers": "all", "train.max_steps": 2}
    if path.stem.startswith("qlora"):
        changes["model.quantize"] = "{bits: 4, group_size: 32}"  # the preset's base is quantized already
    result = finetune(path, [f"{key}={value}" for key, value in changes.items()])
    assert result.steps == 2
    assert math.isfinite(result.final_loss)
    assert (tmp_path / "run" / "adapters.safetensors").exists()


def test_every_preset_says_what_it_is_for():
    presets = [path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in ("quickstart", "reference")]
    assert len(presets) == 9
    for path in presets:
        head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        for word in ("# For: ", "# Rows: ", "# Needs: ", "# Measured: "):
            assert [line for line in head if line.startswith(word)], (path.name, word)
        assert f"`{path.name}`" in README


QWEN3 = {
    "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {  # hidden_size, num_hidden_layers, intermediate_size, num_attention_heads, tied, bits
    "Qwen/Qwen3-0.6B": (1024, 28, 3072, 16, True, None),
    "Qwen/Qwen3-0.6B-Base": (1024, 28, 3072, 16, True, None),
    "Qwen/Qwen3-1.7B": (2048, 28, 6144, 16, True, None),
    "mlx-community/Qwen3-1.7B-4bit": (2048, 28, 6144, 16, True, 4),
    "mlx-community/Qwen3-4B-4bit": (2560, 36, 9728, 32, True, 4),
    "mlx-community/Qwen3-14B-4bit": (5120, 40, 17408, 40, False, 4),
}


@pytest.mark.parametrize(
    "name",
    ["chat", "completion", "long-context", "qlora-16gb", "qlora-32gb", "qlora-8gb", "text", "tools"],  # not of a file
)
def test_presets_need_what_the_plan_says(name, tmp_path, monkeypatch, capsys):
    """Within a tenth: of a model of the real shape, in the types of a GPU, with the longest rows that it takes."""
    path = ROOT / "configs" / f"{name}.yaml"
    said = re.search(r"^# Needs: ([\d.]+) GB by mlx-lora plan\b", path.read_text(), re.MULTILINE)
    *shape, bits = SHAPES[config_file.load(path).model.path]
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "tie_word_embeddings")
    quantization = {"quantization": {"group_size": 64, "bits": bits}} if bits else {}
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | dict(zip(names, shape, strict=True)) | quantization))
    arguments = ["plan", str(path), "--set", f"model.path={tmp_path}", "--device", "gpu", "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    with suppress(SystemExit):  # where this machine is too small for it
        plan._main()
    assert float(said[1]) == pytest.approx(json.loads(capsys.readouterr().out)["bytes"]["peak"] / 1e9, rel=0.1)


def test_the_quickstart_rows_are_what_their_generator_makes(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_quickstart_data.py"), str(tmp_path / "rows.jsonl")], check=True
    )
    assert ended.returncode == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == (ROOT / "configs" / "quickstart.jsonl").read_bytes()


@pytest.mark.slow
def test_the_quickstart_learns(quickstart):
    shares = {
        name: int(share)
        for name, share in re.findall(r"^(base|tuned) .*exactly right .*\((\d+) %\)", quickstart, re.MULTILINE)
    }
    assert shares["base"] <= 5
    assert shares["tuned"] >= 80
