"""`mlx-lora`: one entry to all commands, its help, and what shells complete."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lora import __version__
from mlx_lora.__main__ import COMMANDS, SHELLS, _completion, _module

PACKAGE = Path(__file__).parents[1] / "mlx_lora"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_lora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_command_of_the_package_is_in_it():
    runnable = {
        path.stem.replace("_", "-")
        for path in PACKAGE.glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text() and path.stem != "__main__"
    }
    runnable |= {path.parent.name.replace("_", "-") for path in PACKAGE.glob("*/__main__.py")}
    assert runnable | {"completion"} == COMMANDS.keys()


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"completion"}))
def test_each_command_helps_under_its_own_name(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = _module(name)._parser().format_help()
    assert text.startswith(f"usage: mlx-lora {name}")
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.parametrize("name", ["completion", "doctor"])
def test_what_follows_a_command_is_its_own(name):
    ended = run(name, "--help")
    assert (ended.returncode, ended.stdout.split("\n")[0][: 16 + len(name)]) == (0, f"usage: mlx-lora {name}")


def test_a_package_runs_by_its_main(tmp_path):
    """As `python -m` runs it."""
    package = tmp_path / "mlx_lora" / "data"
    shutil.copytree(PACKAGE, tmp_path / "mlx_lora", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mlx_lora" / "export.py").unlink()
    package = tmp_path / "mlx_lora" / "export"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys\ndef _main():\n    print('from', *sys.argv)\n")
    command = [sys.executable, "-m", "mlx_lora", "export", "--to", "gguf"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "from mlx-lora export --to gguf\n"), ended.stderr


def test_the_help_names_every_command_and_imports_none():
    code = "import sys; from mlx_lora.__main__ import main; sys.argv = ['mlx-lora', '--help']\n"
    code += "try: main()\nfinally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    for name, meaning in COMMANDS.items():
        assert f"  {name} " in ended.stdout
        assert meaning in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) < 80
    assert not {"mlx", "mlx_lm", "numpy", "pydantic", "transformers", "rich", "yaml"} & set(ended.stderr.split())


def test_it_says_its_version():
    assert run("--version").stdout == f"mlx-lora {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "commands:"),
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["xyzzy"], "mlx-lora --help"),
        (["--fast", "train"], "--fast"),
        (["completion", "powershell"], "bash"),
    ],
)
def test_bad_input_is_exit_code_2(arguments, words):
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_arguments_and_exit_codes_are_the_commands():
    ended = run("convert-config", "--from", "axolotl", "none.yaml")
    assert (ended.returncode, ended.stderr[:24]) == (2, "error: none.yaml: cannot")
    assert run("config-file", "reference").stdout.startswith("# yaml-language-server")


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_commands_and_options(shell):
    text = _completion(shell)
    for word in ("convert-config", "dry-run", "merged-gguf"):
        assert word in text


def test_bash_completes(tmp_path):
    """A real bash, asked for what follows a few words."""
    (tmp_path / "my-config.yaml").touch()
    script = _completion("bash")
    for words, wanted in (
        (["mlx-lora", "exp"], "export"),
        (["mlx-lora", "train", "--dry"], "--dry-run"),
        (["mlx-lora", "train", "--config", "my-"], "my-config.yaml"),
        (["mlx-lora", "export", "--to", "peft", "--dtype", "q8"], "q8_0"),
    ):
        code = f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
        code += '$(complete -p mlx-lora | sed "s/.*-F \\([^ ]*\\).*/\\1/") mlx-lora "${COMP_WORDS[COMP_CWORD]}" ""\n'
        code += 'printf "%s\\n" "${COMPREPLY[@]}"'
        ended = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert wanted in ended.stdout.split(), (words, ended.stdout, ended.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_behind_the_output_is_one_clear_error():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mlx_lora", "config-file", "table"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: [Errno 28]")
    assert len(ended.stderr.splitlines()) == 1
