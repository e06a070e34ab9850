"""`mlx-lora init`: configs that load and can be planned, asked for in a real terminal or given as flags."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_lora import config_file, data, init, metrics, model
from mlx_lora.errors import InputError
from mlx_lora.train import dry_run

ROWS = {
    "chat": '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}\n',
    "completion": '{"prompt": "Hello", "completion": "Hi"}\n',
    "text": '{"text": "Hello, this is a text."}\n',
}


@pytest.mark.parametrize("goal", list(init.GOALS))
@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-14B", "models/a: b.gguf", "~/models/mine"])
def test_every_answer_gives_a_config(tmp_path, goal, name):
    path = tmp_path / "my.yaml"
    path.write_text(init.text(name, "rows # 1.jsonl", goal, 16, "my.yaml"))
    loaded = config_file.load(path)
    assert loaded.model.path == str(Path(name).expanduser())
    assert (loaded.model.quantize is not None) == (name == "Qwen/Qwen3-14B")
    assert (loaded.data.train, loaded.output_dir) == ("rows # 1.jsonl", "runs/my")
    assert (loaded.train.plan, loaded.train.memory_limit) == ("auto", 10.4)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# ")]
    assert all("  # " in line or line.endswith(":") for line in lines)


def test_lines_fit_a_terminal():
    for goal in init.GOALS:
        assert max(map(len, init.text("Qwen/Qwen3-32B", "data/train.jsonl", goal, 16).splitlines())) <= 80


def test_a_model_that_cannot_fit_is_said():
    assert "18.0 GB of weights, not 64.0: take a smaller model" in init.text("Qwen/Qwen3-32B", "rows.jsonl", "chat", 16)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("mlx-community/Llama-3.2-3B-Instruct-4bit", 3e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("models/SmolLM2-135M-Instruct.Q4_1.gguf", 135e6),
        ("microsoft/phi-4", None),
        ("me/model-2bits", None),
    ],
)
def test_sizes_are_read_off_names(name, size):
    assert init._parameters(name) == size


SHOWN = {  # what stands in a file: the goal that follows, and data.columns
    "a.jsonl": (ROWS["chat"], "chat", {}),
    "b.jsonl": ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "On", '
                '"tool_calls": [{"function": {"name": "a", "arguments": {}}}]}], "tools": []}\n', "tools", {}),
    "c.jsonl": ('{"instruction": "Hi", "input": "", "output": "Hello", "text": "Hi Hello"}\n', "completion", {}),
    "d.jsonl": ('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}\n', "chat", {}),
    "e.csv": ("Question,Answer,source\nHello,Hi,me\n", "completion", {"prompt": "Question", "completion": "Answer"}),
    "f.tsv": ('talk\tid\n"[{""role"": ""user"", ""content"": ""Hi""}, {""role"": ""assistant"", ""content"": ""a""}]"'
              "\t1\n", "chat", {"messages": "talk"}),
    "g.jsonl": ('{"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}\n', "chat",
                {"conversations": "turns"}),
    "h.csv": ("paragraph\nOnce upon a time\n", "text", {"text": "paragraph"}),
    "i.txt": ("Once upon a time.\n", "text", {}),
    "j": (ROWS["text"], "text", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHOWN))
def test_rows_that_are_there_say_the_goal_and_the_columns(capsys, tiny_model, tmp_path, name):
    """And a run takes them so: every row is used, as the form that was seen."""
    content, goal, columns = SHOWN[name]
    rows, out = tmp_path / name, tmp_path / "my.yaml"
    if "." in name:
        rows.write_text(content)
    else:
        rows.mkdir()
        (rows / "part.jsonl").write_text(content)
    seen = init.look(str(rows))
    assert seen.goals[0] == goal
    out.write_text(init.text(str(tiny_model), str(rows), goal, 8, rows=seen))
    loaded = config_file.load(out, ["data.valid=0"])
    assert loaded.data.columns == columns
    assert loaded.data.loss_on == init.GOALS[goal][2]["data.loss_on"][0]
    if goal == "tools":  # the tiny model's template writes none
        return
    used = data.load(loaded.data, model.load_tokenizer(tiny_model))[0]
    assert (used.read, used.used, list(used.forms)) == (1, 1, [seen.form])


def test_columns_that_are_not_read_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label,id\nGreat!,good,1\n")
    seen = init.look(str(tmp_path / "rows.csv"))
    assert "# rows of text; not read: label, id" in init.text("m", "rows.csv", "text", 8, rows=seen)


def test_a_table_in_parquet_is_looked_at(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"query": ["Hi"], "response": ["Hello"]}), tmp_path / "rows.parquet")
    seen = init.look(str(tmp_path / "rows.parquet"))
    assert seen.options["data.columns"][0] == {"prompt": "query", "completion": "response"}


def test_columns_that_say_nothing_are_listed(run_command, tmp_path):
    rows, out = tmp_path / "rows.csv", tmp_path / "my.yaml"
    rows.write_text("frage,antwort,notiz\nHallo,Guten Tag,x\n")
    flags = ["--model", "some/model", "--data", rows, "--memory", "8", "--out", out]
    unasked = run_command("init", *flags, stdin=subprocess.DEVNULL)
    assert (unasked.returncode, "--goal" in unasked.stderr) == (2, True)
    made = run_command("init", *flags, "--goal", "completion")
    assert made.returncode == 0, made.stderr
    assert "rows.csv holds frage, antwort, notiz: say in" in made.stdout
    assert "# columns to name: frage, antwort, notiz" in out.read_text()


def test_the_goal_follows_from_the_rows_or_has_to_go_with_them(run_command, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS["completion"] * 3)
    flags = ["--model", "some/model", "--data", rows, "--memory", "8", "--out"]
    made = run_command("init", *flags, tmp_path / "my.yaml", stdin=subprocess.DEVNULL)
    assert made.returncode == 0, made.stderr
    assert config_file.load(tmp_path / "my.yaml").data.loss_on == "completion"
    rows.write_text(ROWS["chat"])
    refused = run_command("init", *flags, tmp_path / "other.yaml", "--goal", "completion")
    assert (refused.returncode, "holds rows of messages" in refused.stderr) == (2, True)
    rows.write_text("no JSON\n")
    refused = run_command("init", *flags, tmp_path / "other.yaml", "--goal", "chat")
    assert (refused.returncode, f"{rows}:1: is not valid JSON" in refused.stderr) == (2, True)
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize("goal", list(ROWS))
def test_every_goal_can_be_planned(capsys, tiny_model, tmp_path, goal):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "my.yaml"
    rows.write_text("".join(ROWS[goal].replace("Hello", f"Hello {number}") for number in range(30)))
    out.write_text(init.text(str(tiny_model), str(rows), goal, 8))
    dry_run(config_file.load(out), metrics.Log())
    assert "parameters train" in capsys.readouterr().out


def test_flags_in_the_place_of_answers(run_command, tmp_path):
    out = tmp_path / "new" / "my.yaml"
    flags = ["--model", "some/model", "--data", "none.jsonl", "--goal", "text", "--memory", "8", "--out", out]
    made = run_command("init", *flags)
    assert made.returncode == 0, made.stderr
    assert 'put rows into it, each on one line:\n{"text": "..."}' in made.stdout
    assert [line.split()[1] for line in made.stdout.splitlines()[-3:]] == ["data", "plan", "train"]
    assert f"mlx-lora data {out}" in made.stdout
    assert config_file.load(out).model.path == "some/model"
    again = run_command("init", *flags)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)


def test_without_a_terminal_the_missing_flags_are_named(run_command, tmp_path):
    ended = run_command("init", "--goal", "chat", "--out", tmp_path / "my.yaml", stdin=subprocess.DEVNULL)
    assert ended.returncode == 2
    assert "--model --data --memory" in ended.stderr
    assert not (tmp_path / "my.yaml").exists()


@pytest.mark.parametrize(("flag", "value"), [("--memory", "none"), ("--memory", "0"), ("--goal", "fame")])
def test_faulty_flags_are_named(run_command, flag, value):
    ended = run_command("init", flag, value)
    assert (ended.returncode, flag in ended.stderr) == (2, True)


def test_what_no_config_may_hold_is_refused():
    with pytest.raises(InputError, match=r"model\.path"):
        init.text("", "rows.jsonl", "chat", 16)


def test_four_questions_in_a_terminal(tmp_path):
    """A real terminal: an answer that cannot be read is asked for again, Enter takes what is offered."""
    (tmp_path / "texts.txt").write_text("Once upon a time.")
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "mlx_lora.init", "--out", str(tmp_path / "my.yaml")]
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, cwd=tmp_path) as asking:
        os.close(inside)
        seen = b""
        for question, answer in (
            (b"Model", "some/model-7B"),
            (b"Data", "texts.txt"),
            (b"Goal [4]", "9"),
            (b"9 is none of", ""),
            (b"Memory", "plenty"),
            (b"plenty is no number", "32"),
        ):
            seen = _until(terminal, question, seen)
            os.write(terminal, answer.encode() + b"\n")
        _until(terminal, b"is written", seen)
        assert asking.wait(60) == 0
    os.close(terminal)
    loaded = config_file.load(tmp_path / "my.yaml")
    assert (loaded.model.path, loaded.data.train) == ("some/model-7B", "texts.txt")
    assert (loaded.data.loss_on, loaded.train.epochs, loaded.train.memory_limit) == ("all", 1, 20.8)
    assert loaded.model.quantize is not None


def _until(terminal: int, text: bytes, seen: bytes) -> bytes:
    """Reads what is printed until `text` was; returns what came after it."""
    end = time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(terminal, 4096)
    return seen[seen.index(text) + len(text) :]
