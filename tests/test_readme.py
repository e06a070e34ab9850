"""What the README and the configs folder promise is run as it stands."""

import contextlib
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mlx_lora import config_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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
        start = [sys.executable] if program == "python" else [sys.executable, "-m", *program.split(".")]
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_can_be_planned(path, tiny_model, tmp_path, run_command):
    """With a tiny model; reference.yaml names rows that are not there, so it gets the quickstart's."""
    loaded = config_file.load(path)
    rows = loaded.data.train if Path(ROOT / loaded.data.train).exists() else "configs/quickstart.jsonl"
    changes = [f"model.path={tiny_model}", f"data.train={rows}", f"output_dir={tmp_path / 'run'}", "lora.layers=all"]
    arguments = [part for change in changes for part in ("--set", change)]
    planned = run_command("train", "--config", path, *arguments, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "parameters train" in planned.stdout
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "run").iterdir())


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
