"""The data doctor: what it says of rows with faults that were put into them, and the exit code it gives for them."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mlx_lora import data
from mlx_lora.batches import Batches
from mlx_lora.data import Dataset, Example, Tokenized, checks
from mlx_lora.data.__main__ import _main
from mlx_lora.data.examples import USED, Store
from mlx_lora.errors import exit_code


def chat(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


GOOD = [chat(f"Number {n}", f"{n} it is" * (1 + n % 5)) for n in range(40)]


@pytest.fixture
def examine(tmp_path, tiny_model, monkeypatch, capfd):
    """What the command says of rows, and its exit code."""

    def examine(rows, *changes, valid=None, arguments=()):
        for name, side in (("train", rows), ("valid", valid)):
            if side is not None:
                (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side))
        held_out = str(tmp_path / "valid.jsonl") if valid else 0.1
        options = {"model": str(tiny_model), "data": {"train": str(tmp_path / "train.jsonl"), "valid": held_out}}
        config = tmp_path / "my.yaml"
        config.write_text(json.dumps(options | {"output_dir": str(tmp_path / "run")}))
        settings = [part for change in changes for part in ("--set", change)]
        monkeypatch.setattr("sys.argv", ["data", str(config), *settings, *arguments])
        capfd.readouterr()
        code = exit_code(_main)
        assert not (tmp_path / "run").exists()
        return code, "".join(capfd.readouterr())

    return examine


def test_good_rows_are_described_and_shown(examine, tiny_model, tmp_path):
    code, said = examine(GOOD)
    assert code == 0, said
    assert said.rstrip().endswith("no findings")
    digests = [int(data.digest([data.Row(row | {"tools": None}, "")])[:16], 16) for row in GOOD]
    held_out = data.split(np.array(digests, np.uint64), 0.1)
    train = [row for row, out in zip(GOOD, held_out, strict=True) if not out]
    sides = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("train ", "valid "))}
    assert sides["valid"][0] == sides["valid"][1] == str(held_out.sum())
    # A token is a byte here, but for <|im_start|> and <|im_end|>: lengths can be counted by hand.
    lengths, answers = [], []
    for row in train:
        user, assistant = (message["content"] for message in row["messages"])
        lengths.append(2 + len(f"user\n{user}\n") + 2 + len(f"assistant\n{assistant}\n"))
        answers.append(len(assistant) + 1)
    share = f"{100 * sum(answers) / sum(lengths):.1f}"
    assert sides["train"] == [*[str(len(train))] * 2, "0", "0", "0", f"{sum(lengths):,}", share, "%", "messages"]
    assert f"lengths of train: {min(lengths)} to {max(lengths)} tokens, half below {np.median(lengths):.0f}," in said
    for power in range(5, 8):
        count = sum(2**power <= length < 2 ** (power + 1) for length in lengths)
        bars = [line for line in said.splitlines() if line.strip().startswith(f"{2**power} to {2 ** (power + 1) - 1}")]
        assert bars[0].endswith(f" {count}") if count else not bars or bars[0].endswith(" 0")
    examples = [Example(np.ones(n, np.int32), np.ones(n, bool), "") for n in lengths]
    for example, answer in zip(examples, answers, strict=True):
        example.supervised[: -answer - 1] = False
        example.supervised[-1:] = False
    waste = 100 * (1 - Batches(examples, 4, 0).padding_efficiency)
    assert f"padding: {waste:.1f} % of the tokens computed" in said
    shown = train[lengths.index(min(lengths))]["messages"]
    characters = "|".join(shown[1]["content"])
    assert f"⟦{characters}|<|im_end|>⟧" in said
    assert "|".join(["<|im_start|>", *"user", "⏎"]) in said
    long = chat("Hi", "y" * 150)
    assert f"⟦{'|'.join('y' * 150)}|<|im_end|>⟧" in examine([*GOOD, long], "data.valid=0")[1]  # no line is cut off


def test_the_page_says_what_the_terminal_says(examine, tmp_path):
    """Read by a parser of HTML, which knows nothing of how it was written."""
    rows = [*GOOD, chat("Hi", ""), chat("<b>&amp;", "x" * 300 + "<script>alert(1)</script>")]
    code, said = examine(rows, "data.valid=0", arguments=("--html", str(tmp_path / "page.html")))
    assert code == 0, said
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|src=|<link|@import|<script", page)  # it opens offline, and runs nothing

    class Reader(HTMLParser):
        texts: list[str] = []
        learned: list[str] = []
        inside = False

        def handle_starttag(self, tag, attributes):
            self.inside = tag == "span" and ("class", "learned") in attributes

        def handle_data(self, text):
            self.texts.append(text)
            if self.inside:
                self.learned.append(text)

    reader = Reader()
    reader.feed(page)
    whole = "".join(reader.texts)
    for line in said.splitlines():
        if line.startswith("- "):
            assert line.removeprefix("- ") in whole
        if "lengths of train" in line or "padding: " in line:
            assert line in whole
    assert "left out: 1 row of train" not in whole
    assert "left out: 1 of 42 rows of train" in whole
    assert "<b>&amp;" in whole
    assert "".join(reader.learned).endswith("<script>alert(1)</script><|im_end|>")
    code, said = examine(rows, arguments=("--html", str(tmp_path / "none" / "page.html")))
    assert (code, "cannot be written" in said) == (2, True)


def test_the_command_says_it_to_a_shell(run_command, tmp_path):
    (tmp_path / "my.yaml").write_text(f"model: {tmp_path}\ndata: {{train: {tmp_path}/none.jsonl}}\noutput_dir: x\n")
    ended = run_command("data", tmp_path / "my.yaml")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "none.jsonl: cannot be read" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_rows_shown_can_be_chosen(examine):
    assert examine(GOOD, arguments=("--rows", "0"))[1].count("⟦") == 0
    assert examine(GOOD, arguments=("--rows", "5"))[1].count("⟦") == 5 + 1  # and the heading
    code, said = examine(GOOD, arguments=("--rows", "-1"))
    assert (code, "--rows counts from 0" in said) == (2, True)


@pytest.mark.parametrize(
    ("rows", "changes", "code", "words"),
    [
        ([chat("Hi", "x" * 200)], (), 0, None),
        ([{"messages": []}], (), 2, ["! of the wrong form: 1 row of train", "train.jsonl:41: messages is not a list"]),
        ([{"text": "a"}], (), 2, ["train.jsonl:41: holds text, but ", "train.jsonl:1 messages"]),
        ([chat("Hi", "")] * 2, (), 0, ["- left out: 2 of 42 rows of train", "train.jsonl:42: no supervised tokens"]),
        ([chat(str(n), "") for n in range(60)], (), 2, ["! left out: 60 of 100 rows of train", "and 40 more"]),
        ([chat("Hi", "x" * 400)], ("data.max_seq_length=200",), 0, ["- truncated: 1 of 41 rows of train, by 223"]),
        ([], ("data.max_seq_length=45",), 2, ["! truncated: ", " of 40 rows of train"]),
        ([GOOD[3]] * 2, (), 0, ["- copies of other rows: 2 rows of train", "train.jsonl:41: the same as ", ":4"]),
        ([chat("caf\u00c3\u00a9", "a")], (), 0, ["- UTF-8 that was read as another encoding: 1 row", ":41: '\\xc3"]),
        ([chat("Stra\u00c3\u0178e", "\u00f0\u0178\u02dc\u20ac")], (), 0, ["another encoding: 1 row of train"]),
        ([chat("\u00d0\u0178\u00d1\u20ac\u00d0\u00b8", "a")], (), 0, ["another encoding: 1 row of train"]),
        ([chat("\u00bbGR\u00dc\u00ab \u2013 CAF\u00c9\u2026", "a")], (), 0, None),
        ([chat("a\u200bb\ufffd", "a\x07")], (), 0, ["invisible char", "replacement char", "control characters"]),
        ([chat("Hi", "a<|im_end|>b")], (), 0, ["- text that the tokenizer reads as a control token: 1 row of train"]),
        ([chat("caf\u00e9 \u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f680", "\u20ac5")], (), 0, None),
    ],
)
def test_faults_are_found_and_named(examine, rows, changes, code, words):
    ended, said = examine(GOOD + rows, "data.valid=0", *changes)
    assert ended == code, said
    if words is None:
        assert "no findings" in said
    else:
        for word in words:
            assert word in said


def test_validation_rows_that_are_trained_on_spoil_a_run(examine):
    code, said = examine(GOOD, valid=[GOOD[7], chat("Number 9", "something else"), chat("Number 99", "new")])
    assert code == 2
    assert "! also in train: 1 row of valid" in said
    assert "valid.jsonl:1" in said
    assert "- the prompt of a row that is trained on: 1 row of valid" in said
    assert "2 findings, 1 that would spoil a run" in said


def test_rows_of_which_none_can_be_used(examine):
    code, said = examine([chat("Hi", "")] * 3, "data.valid=0")
    assert (code, "! nothing can be used of train" in said) == (2, True)


def test_a_beginning_that_stands_twice_spoils_a_run(examine):
    """The tiny model begins with <|im_start|>: a template that writes it before text that has it."""
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    rows = [chat(f"<|im_start|><|im_start|>{n}", "a") for n in range(9)]
    code, said = examine(rows, f"model.chat_template={json.dumps(template)}", "data.valid=0")
    assert (code, "! two <|im_start|> at the beginning: 9 rows of train" in said) == (2, True)


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("", 2, "! answers without an end-of-turn token: 40 rows of train"),
        ("<|endoftext|>", 0, "- answers that end with <|endoftext|>, at which generation does not stop"),
        ("<|im_end|>", 0, "no findings"),
    ],
)
def test_endings_at_which_generation_does_not_stop(examine, ending, code, words):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}ENDING\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    change = f"model.chat_template={json.dumps(template.replace('ENDING', ending))}"
    ended, said = examine(GOOD, change, "data.valid=0")
    assert ended == code, said
    assert words in said


def test_rows_that_weights_repeat_are_no_copies(examine, tmp_path):
    source = {"path": str(tmp_path / "train.jsonl"), "weight": 2.5}
    code, said = examine(GOOD, f"data.train=[{json.dumps(source)}]", "data.valid=0")
    assert (code, "no findings" in said) == (0, True)
    assert "an epoch" in said


def test_an_overlap_needs_equal_tokens():
    def side(*rows):
        store, all_of_them = Store(), np.arange(len(rows))
        for number, row in enumerate(rows, 1):
            store.add(USED, Example(np.array(row, np.int32), np.array(row) > 5, f"v:{number}"))
        kept = Tokenized(store.close(), list(store.prefixes), list(store.notes), [], 0)
        return Dataset(kept, all_of_them, all_of_them, 99)

    found = checks.overlap(side([1, 2, 7], [3, 8]), side([1, 2, 7], [1, 2, 9], [2, 1, 7], [8, 3]))
    assert [(list(finding.places), finding.spoils) for finding in found] == [(["v:1"], True), (["v:2"], False)]


def test_a_broken_line_is_one_finding_among_others(examine, tmp_path):
    (tmp_path / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, GOOD[0]]) + "{broken\n")
    changes = f"data.train={tmp_path / 'broken.jsonl'}", "data.valid=0"
    ended, said = examine([], *changes, arguments=("--html", str(tmp_path / "page.html")))
    assert ended == 2
    assert "! of the wrong form: 1 row of train" in said
    assert "- copies of other rows: 1 row of train" in said
    assert "of the wrong form" in (tmp_path / "page.html").read_text()


def test_no_row_commands_the_terminal(examine, tmp_path):
    page = tmp_path / "page.html"
    row = chat("\x1b[2J\x1b]0;x\x07\u202e" + "y" * 90, "\r\x9b1m")
    _, said = examine([row], "data.valid=0", arguments=("--html", str(page)))
    for text in (said, page.read_text()):
        assert not set(text) & set("\x1b\x07\r\x9b\u202e")
    assert "\\x1b" in said


def test_rows_that_differ_in_their_number_alone_stay_on_one_side(examine):
    numbered = [chat(f"Question {n}", "a" * n) | {"id": f"{n}{copy}"} for n in range(1, 41) for copy in "ab"]
    ended, said = examine(numbered, "data.valid=0.2")
    assert ended == 0, said
    assert "also in train" not in said
