"""Where rows come from and what they hold: every kind of file gives the rows that it was written from."""

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pytest

from mlx_lora import data
from mlx_lora.config import Data, Source
from mlx_lora.data import Row, formats
from mlx_lora.errors import InputError

ROWS = [{"prompt": "Hi", "completion": "Hello!"}, {"prompt": 'a "b", c\nd\te', "completion": "ü\u2028"}]


def contents(path, **options):
    return [row.content for row in data.read(path, **options)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, delimiter) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def options(**changes) -> Data:
    return Data(**{"train": "rows.jsonl", **changes})


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, suffix, delimiter):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + table(ROWS, delimiter).encode())
    assert contents(path) == ROWS
    assert [row.place for row in data.read(path)] == [f"{path}:2", f"{path}:3"]


def test_faulty_rows_of_a_table_are_listed_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",a\n\nb\n"c",d,e\nf,g\n')
    with pytest.raises(InputError) as caught:
        data.read(path)
    faults = [line.strip() for line in str(caught.value).splitlines()]
    assert [fault.removeprefix(f"{path}:")[:11] for fault in faults] == ["5: has 1 ce", "6: has 3 ce"]
    for header in ("a,a\nb,c\n", "\n\n", ",\n1,2\n"):
        path.write_text(header)
        with pytest.raises(InputError, match=r"is no header|holds no rows"):
            data.read(path)
    path.write_text(',prompt,completion\n0,"Hi",Hello!\n')  # an index without a name, as pandas writes it
    assert contents(path) == ROWS[:1]
    path.write_text('prompt,completion\n"Hi",Hello!\n"never closed,\n')
    with pytest.raises(InputError, match=r"rows.csv:3: is not a valid row of cells"):
        data.read(path)


def test_compressed_files(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    for name, content in (("rows.jsonl", lines(ROWS)), ("rows.csv", table(ROWS, ",").encode())):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        first, second = content[: len(content) // 2], content[len(content) // 2 :]
        compress = zstandard.ZstdCompressor().compress  # two frames, as parallel compressors write
        (tmp_path / f"{name}.zst").write_bytes(compress(first) + compress(second))
        for packed in (".gz", ".zst"):
            assert contents(tmp_path / f"{name}{packed}") == ROWS
            (tmp_path / f"{name}{packed}").write_bytes(content)
            with pytest.raises(InputError, match=f"is not {packed} data, or damaged"):
                data.read(tmp_path / f"{name}{packed}")
    flushed = zstandard.ZstdCompressor().compressobj()
    blocks = [flushed.compress(line) + flushed.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for line in [lines(ROWS)] * 9]
    for name, content in (("gz", gzip.compress(lines(ROWS * 100))[:-20]), ("zst", b"".join(blocks[:5]))):
        (tmp_path / f"cut.jsonl.{name}").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            data.read(tmp_path / f"cut.jsonl.{name}")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    chats = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]} for text in "ax"]
    for rows in (ROWS, chats):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert contents(path) == rows
    assert data.read(path)[1].place == f"{path}:row 2"
    calls = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": arguments}}]}]}
        for arguments in ({"a": 2}, {"city": "Oslo", "days": [{"n": 1}]})
    ]
    parquet.write_table(pyarrow.Table.from_pylist(calls), path)
    assert contents(path) == calls  # not with the other row's arguments as null
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is not Parquet, or damaged"):
        data.read(path)


@pytest.mark.parametrize("suffix", ["txt", "md", "txt.gz"])
def test_a_document_is_cut_into_pieces_that_give_it_again(tmp_path, suffix):
    text = "".join(f"Paragraph {n}.\n" + "Some words. " * (n % 7) + "\n\n" for n in range(60)) + "x" * 500 + "\n"
    path = tmp_path / f"book.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    rows = data.read(path, longest=40)
    assert "".join(row.content["text"] for row in rows) == text
    assert max(len(row.content["text"]) for row in rows) <= 120
    assert [row.last for row in rows] == [False] * (len(rows) - 1) + [True]
    for row in rows[:10]:
        line = int(row.place.rpartition(":")[2])
        assert "\n".join(text.split("\n")[line - 1 :]).startswith(row.content["text"])
        assert row.content["text"].endswith("\n\n")
    assert len(data.read(path, longest=100_000)) == 1


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path):
    for number in (2, 1):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines([{"text": f"{number}{letter}"} for letter in "ab"]))
    (tmp_path / "part-3.csv").write_text("text\n3a\n")
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "part-4.ndjson").write_bytes(lines([{"text": "4a"}]))
    assert [row["text"] for row in contents(tmp_path)] == ["1a", "1b", "2a", "2b", "3a", "4a"]


def test_nothing_in_a_folder_is_left_out_in_silence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "more").mkdir()
    assert contents(tmp_path) == ROWS
    for name, words in (
        ("more/b.csv", "holds a folder of rows, more"),
        ("b.jsonl.bz2", "b.jsonl.bz2, which cannot be"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=words):
            data.read(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        data.read(tmp_path)


def test_a_pipe_is_refused_and_not_read_in_part(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe.jsonl: cannot be read \(is a pipe\)"):
        data.read(tmp_path / "pipe.jsonl")


def test_files_of_another_kind_than_their_name_says(tmp_path):
    (tmp_path / "rows.json").write_bytes(lines(ROWS))
    with pytest.raises(InputError, match=r"one object a line\? then name it .jsonl"):
        data.read(tmp_path / "rows.json")
    (tmp_path / "rows.csv").write_text("prompt;completion\nHi;Hello!\n")
    with pytest.raises(InputError, match=r"rows.csv:1: has semicolons between its cells"):
        data.read(tmp_path / "rows.csv")


def test_a_folder_that_holds_more_than_training_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no files of rows"):
        data.read(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "README.md").write_text("# Rows")
    with pytest.raises(InputError, match=r"README.md beside files of rows"):
        data.read(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "valid.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(InputError, match=r"valid.jsonl, which is not to be trained on"):
        data.read(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert contents(tmp_path) == ROWS  # as data.valid


def test_a_data_set_is_read_through_datasets(tmp_path, monkeypatch):
    """A folder OWNER/NAME stands for the hub's: `datasets` reads both alike."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path("me/rows")
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(lines(ROWS))
    (folder / "test.jsonl").write_bytes(lines(ROWS[1:]))
    assert contents("hub:me/rows") == ROWS
    assert data.read("hub:me/rows:test[:1]")[0].content == ROWS[1]
    assert data.read("hub:me/rows:train")[1].place == "hub:me/rows:train:row 2"
    for name in ("hub:me/rows:none", "hub:me/other", "hub:me/rows@other:train"):
        with pytest.raises(InputError, match=f"^{name}: cannot be loaded: "):
            data.read(name)
    with pytest.raises(InputError, match="is not of the form"):
        data.read("hub:a/b/c")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import sys

    for package, name in (("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "hub:a/b")):
        monkeypatch.setitem(sys.modules, package, None)  # as it is where the package is not installed
        if not name.startswith("hub:"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf'needs {package}: pip install "mlx-lora\[data\]"'):
            data.read(name if name.startswith("hub:") else tmp_path / name)


# ---- several sources -------------------------------------------------------------------------------------------------


def test_sources_are_seen_as_often_as_their_weights_say(tmp_path, tokenizer):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": f"{name}{n}"} for n in range(400)]))
    train_paths = [str(tmp_path / "a.jsonl")]
    train_paths += [{"path": str(tmp_path / f"{n}.jsonl"), "weight": weight} for n, weight in (("b", 2.5), ("c", 0.25))]
    config = options(train=train_paths, valid=0.1)
    train, valid = data.load(config, tokenizer)
    rows = [tokenizer.decode(example.tokens.tolist()[:-1]) for example in train.examples]
    seen = {name: [text for text in rows if text[0] == name] for name in "abc"}
    held_out = {tokenizer.decode(example.tokens.tolist()[:-1]) for example in valid.examples}
    for name in "ab":
        assert len(set(seen[name])) == 400 - sum(text[0] == name for text in held_out)
    assert not held_out & set(rows)
    times = [seen["b"].count(text) for text in set(seen["b"])]
    assert set(times) == {2, 3}
    assert abs(times.count(3) - 180) < 45  # binomial: 4.7 deviations
    assert abs(len(seen["c"]) - 90) < 40
    read = 1200 - len(valid.examples)
    used = len(set(rows))
    expected = f"train: {read} rows read, {used} used, 0 truncated, 0 skipped, {read - used} left out by weight, "
    assert train.account("train")[0].startswith(f"{expected}{len(rows)} an epoch; ")
    again = data.load(config, tokenizer)[0]
    assert again.digest == train.digest
    assert again.order.tolist() == train.order.tolist()
    apart = data.load(options(train=train_paths, valid=str(tmp_path / "c.jsonl")), tokenizer)[1]
    assert [example.place for example in apart.examples] == [f"{tmp_path}/c.jsonl:{n}" for n in range(1, 401)]
    assert config.sources[0] == Source(path=train_paths[0])
    few = tmp_path / "few.jsonl"
    few.write_bytes(lines(ROWS))
    with pytest.raises(InputError, match="leave no row to train on"):
        data.load(options(train=[{"path": str(few), "weight": 1e-9}], valid=0.0), tokenizer)


# ---- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form", "content"),
    [
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4", "text": 3, "id": 1},
            None,
            {"prompt": "Add.\n\n2, 2", "completion": "4"},
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, "alpaca", {"prompt": "Hi", "completion": "Hello!"}),
        ({"instruction": "Hi", "output": "Hello!", "system": "S"}, "alpaca", {"prompt": "Hi", "completion": "Hello!"}),
        ({"prompt": "Hi", "completion": "Hello!"}, "completion", {"prompt": "Hi", "completion": "Hello!"}),
        ({"text": "Hi"}, "text", {"text": "Hi"}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!", "weight": 0}]},
            "sharegpt",
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "weight": 0}]},
        ),
        (
            {"system": "S", "conversations": '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]'},
            "sharegpt",
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello!"},
                ]
            },
        ),
        (
            {"messages": '[{"role": "user", "content": "Hi"}]', "tools": '[{"name": "f"}]'},
            "messages",
            {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]},
        ),
    ],
)
def test_forms_are_seen_by_their_keys(row, form, content):
    if form is None:  # several forms: the config has to say
        with pytest.raises(InputError, match=r"data.format chooses one of text, alpaca"):
            formats.form(row, options())
        form = formats.form(row, options(format="alpaca"))
    else:
        assert formats.form(row, options()) == form
    found = formats.content(row, form, options())
    assert content.items() <= found.items()
    assert found.get("system", "") == (row.get("system", "") if "prompt" in content else "")


def test_alpaca_and_sharegpt_rows_are_the_conversations_that_they_say(tokenizer):
    alpaca = {"system": "Be brief.", "instruction": "Add.", "input": "2, 2", "output": "4"}
    turns = [("system", "Be brief."), ("user", "Add.\n\n2, 2"), ("assistant", "4")]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = [Row(row, f"{number}.jsonl:1") for number, row in enumerate((alpaca, sharegpt, messages))]
    dataset = data.tokenize(rows, tokenizer, options())
    assert len({(e.tokens.tobytes(), e.supervised.tobytes()) for e in dataset.examples}) == 1
    assert dataset.forms == {"alpaca": 1, "sharegpt": 1, "messages": 1}


def test_function_calls_of_sharegpt_are_tool_calls():
    call = {"name": "add", "arguments": {"a": 2}}
    conversation = [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "4"}]
    found = formats.content({"conversations": conversation}, "sharegpt", options())["messages"]
    assert found[0]["tool_calls"] == [{"type": "function", "function": call}]
    assert found[1] == {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Hi", "answer": "Hello!"}, "holds 'question', 'answer'; a row holds messages, or prompt"),
        ({"conversations": []}, "conversations is not a list of messages"),
        ({"conversations": [{"role": "user", "content": "Hi"}]}, "data.columns: {messages: conversations}"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "message 1 is from 'robot'; known are human"),
        ({"conversations": [{"from": "human"}]}, "message 1 (user) has no text content"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is not a JSON object with a name"),
        ({"instruction": "Hi", "output": None}, "output is not a string"),
        ({"messages": [{"role": "user", "content": "Hi", "train": True}]}, "only assistant messages are"),
        ({"messages": [{"role": "assistant", "content": "Hi", "train": "no"}]}, "train is not true or false"),
        ({"messages": [{"role": "assistant", "content": "Hi", "weight": 0.5}]}, "weight is not 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "message 1 is an answer to nothing"),
    ],
)
def test_rows_of_the_wrong_form_are_named_by_place(tokenizer, row, words):
    with pytest.raises(InputError) as caught:
        data.tokenize([Row(row, "rows.jsonl:7")], tokenizer, options())
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert words in str(caught.value)


def test_rows_of_a_file_that_disagree_are_named(tokenizer):
    rows = [Row({"text": "a"}, "a.jsonl:1"), Row({"text": "b"}, "a.jsonl:2"), Row(ROWS[0], "a.jsonl:9")]
    with pytest.raises(InputError, match=r"a.jsonl:9: holds prompt and completion, but a.jsonl:1 text; a file's rows"):
        data.tokenize(rows, tokenizer, options())
    elsewhere = data.tokenize([*rows[:2], Row(ROWS[0], "b.jsonl:1")], tokenizer, options())
    assert elsewhere.forms == {"text": 2, "completion": 1}


def test_columns_of_other_names(tokenizer):
    renamed = options(columns={"prompt": "question", "completion": "answer"})
    row = {"question": "Hi", "answer": "Hello!", "prompt": "not this"}
    found = data.tokenize([Row(row, "a:1")], tokenizer, renamed).examples[0]
    expected = data.tokenize([Row(ROWS[0], "a:1")], tokenizer, options()).examples[0]
    assert found.tokens.tolist() == expected.tokens.tolist()
    swapped = options(columns={"prompt": "completion", "completion": "prompt"})
    assert formats.renamed(ROWS[0], swapped) == {"prompt": "Hello!", "completion": "Hi"}
    with pytest.raises(InputError, match=r"a:1: has no 'question', which data.columns names for prompt"):
        data.tokenize([Row(ROWS[0], "a:1")], tokenizer, renamed)
    assert data.last_answer(row, renamed) == ([{"role": "user", "content": "Hi"}], None, "Hello!")


def test_a_question_is_asked_as_it_is_trained_on():
    """Tools under another name and as JSON text; a call's arguments as the JSON text that OpenAI sends."""
    tool = {"type": "function", "function": {"name": "add"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4.", "train": True},
    ]
    found = data.last_answer(
        {"messages": turns, "functions": json.dumps([tool])}, options(columns={"tools": "functions"})
    )
    before, tools, answer = found
    assert (tools, answer) == ([tool], "4.")
    assert before[0]["content"] == "2 + 2?"
    assert before[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}


def test_a_system_prompt_beside_the_messages_opens_them(tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    system = {"role": "system", "content": "You are a pirate."}
    beside = data.tokenize([Row({"system": "You are a pirate.", "messages": turns}, "a:1")], tokenizer, options())
    within = data.tokenize([Row({"messages": [system, *turns]}, "a:1")], tokenizer, options())
    assert beside.examples[0].tokens.tolist() == within.examples[0].tokens.tolist()
    with pytest.raises(InputError, match="a:1: has a system and a system message"):
        data.tokenize([Row({"system": "No.", "messages": [system, *turns]}, "a:1")], tokenizer, options())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "has a history"),
        ({"instruction": "a", "output": "b", "input": 0}, "input is not a string"),
        ({"prompt": "a", "completion": "b", "system": False}, "system is not a string"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "function_call"),
    ],
)
def test_what_is_not_read_is_no_secret(row, words, tokenizer):
    with pytest.raises(InputError, match=f"a:1: .*{words}"):
        data.tokenize([Row(row, "a:1")], tokenizer, options())


def test_reasoning_can_be_dropped(tokenizer):
    asked = {"role": "user", "content": "Hi"}
    plain = [{"messages": [asked, {"role": "assistant", "content": "Hello!"}]}]
    thought = "<think>\nA greeting.\n</think>\n\n"
    for row in (
        {"messages": [asked, {"role": "assistant", "content": f"{thought}Hello!"}]},
        {"messages": [asked, {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."}]},
        {"messages": [asked, {"role": "assistant", "content": "Hello!", "thinking": "A greeting."}]},
        {"prompt": "Hi", "completion": f"{thought}Hello!"},
        {"prompt": "Hi", "completion": f"{thought}<think>Or not.</think>Hello!"},
        {"prompt": "Hi", "completion": "It began in the prompt.\n</think>\n\nHello!"},
    ):
        dropped = data.tokenize([Row(row, "a:1")], tokenizer, options(reasoning="drop")).examples[0]
        expected = data.tokenize([Row(plain[0], "a:1")], tokenizer, options()).examples[0]
        assert dropped.tokens.tolist() == expected.tokens.tolist()
    with pytest.raises(InputError, match="has no end"):
        data.tokenize([Row({"prompt": "Hi", "completion": "<think>Hm"}, "a:1")], tokenizer, options(reasoning="drop"))
    about = "Write <think> before and </think> after it."
    assert formats._without_thought({"role": "assistant", "content": about})["content"] == about
    kept = data.tokenize([Row({"prompt": "Hi", "completion": f"{thought}Hello!"}, "a:1")], tokenizer, options())
    assert thought in tokenizer.decode(kept.examples[0].tokens.tolist())


# ---- long texts ------------------------------------------------------------------------------------------------------


def test_long_text_is_split_into_pieces_whose_targets_are_all_tokens_but_the_first(tokenizer):
    text = " ".join(f"word{n}" for n in range(100))
    whole = data.tokenize([Row({"text": text}, "a:1")], tokenizer, options()).examples[0].tokens.tolist()
    dataset = data.tokenize([Row({"text": text}, "a:1")], tokenizer, options(max_seq_length=30, on_overflow="split"))
    assert max(example.tokens.size for example in dataset.examples) <= 30
    targets = [token for example in dataset.examples for token in example.tokens[1:].tolist()]
    assert targets == whole[1:]
    assert [example.ends for example in dataset.examples] == [False] * (len(dataset.examples) - 1) + [True]
    assert dataset.account("train")[0].startswith(f"train: 1 rows read, 1 used in {len(dataset.examples)} pieces")
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(InputError, match=r"a:1: .*data.on_overflow: split is for rows of text"):
        data.tokenize([Row(chat, "a:1")], tokenizer, options(max_seq_length=30, on_overflow="split"))


def test_only_the_end_of_a_document_is_learned_as_an_end(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {n} of the book." for n in range(40)))
    dataset = data.tokenize(data.read(path, longest=60), tokenizer, options(max_seq_length=60))
    ends = [int(example.tokens[-1]) == tokenizer.eos_token_id for example in dataset.examples]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert len(ends) > 3
    assert not dataset.truncated
    before = [None, *(example.place for example in dataset.examples)]
    targets = [  # a piece of a row that was cut begins with the token before it
        token
        for example, place in zip(dataset.examples, before, strict=False)
        for token in example.tokens.tolist()[example.place == place :]
    ]
    assert tokenizer.decode(targets) == path.read_text() + tokenizer.eos_token
