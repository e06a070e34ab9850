"""The pages of mlx_lora/docs: their commands and programs are run in their order, their links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lora import config_file

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "mlx_lora" / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_files(text: str, folder: Path) -> None:
    """The files that a page shows, under the names that it gives them."""
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(content)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_works_in_its_order(page, tiny_model, tmp_path):
    """With the README's files, those of the page, and a tiny model where the hub's would be."""
    write_files((ROOT / "README.md").read_text(), tmp_path)
    write_files(page.read_text(), tmp_path)
    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).symlink_to(tiny_model)
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        programs = [["-c", block]]
        if language == "bash":
            lines = [shlex.split(line, comments=True) for line in block.splitlines()]
            assert {line[0] for line in lines} == {"mlx-lora"}
            programs = [["-m", "mlx_lora", *line[1:]] for line in lines]
        for program in programs:
            command = [sys.executable, *program]
            ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert ended.returncode == 0, f"{program}\n{ended.stdout}\n{ended.stderr}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    known = {".".join(keys) for keys, _, _ in config_file.walk()}
    groups = {keys.partition(".")[0] for keys in known if "." in keys}
    for name in re.findall(r"`(\w+\.[\w.]+)", text):
        if name.partition(".")[0] in groups and not name.endswith(".py"):
            assert name in known, name
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "mlx_lora", ROOT / "tests")), name
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (DOCS / link).exists(), link
    assert f"mlx_lora/docs/{page.name}" in (ROOT / "README.md").read_text()
