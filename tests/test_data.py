"""Rows → tokens and targets: the masks are checked against the text that they cover, written out by hand."""

import json
import random

import numpy as np
import pytest

from mlx_lora import data
from mlx_lora.config import Data
from mlx_lora.data import Row
from mlx_lora.errors import InputError

TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def options(**changes) -> Data:
    return Data(train="rows.jsonl", **changes)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spans(tokenizer, example) -> list[str]:
    """The supervised stretches of an example, as text."""
    stretches, open_stretch = [], False
    for token, on in zip(example.tokens.tolist(), example.supervised.tolist(), strict=True):
        if on and open_stretch:
            stretches[-1].append(token)
        elif on:
            stretches.append([token])
        open_stretch = on
    return [tokenizer.decode(stretch) for stretch in stretches]


def tokenize_one(row, tokenizer, **changes):
    dataset = data.tokenize([Row(row, "rows.jsonl:1")], tokenizer, options(**changes))
    return dataset.examples[0]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", ["Hello!<|im_end|>", "4<|im_end|>"]), ("last", ["4<|im_end|>"])],
)
def test_supervised_is_each_answer_and_its_end_of_turn(tokenizer, loss_on, expected):
    example = tokenize_one({"messages": TURN}, tokenizer, loss_on=loss_on)
    assert spans(tokenizer, example) == expected
    whole = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TURN)
    assert tokenizer.decode(example.tokens.tolist()) == whole


def test_all_supervises_everything(tokenizer):
    assert tokenize_one({"messages": TURN}, tokenizer, loss_on="all").supervised.all()


def test_completion_rows_are_a_user_and_an_assistant_turn(tokenizer):
    row = {"prompt": "Hi", "completion": "Hello!"}
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    for loss_on in ("assistant", "completion"):
        example = tokenize_one(row, tokenizer, loss_on=loss_on)
        expected = tokenize_one(chat, tokenizer)
        np.testing.assert_array_equal(example.tokens, expected.tokens)
        np.testing.assert_array_equal(example.supervised, expected.supervised)


def test_text_rows_end_with_the_end_token_and_are_learned_whole(tokenizer):
    example = tokenize_one({"text": "Once upon a time"}, tokenizer)
    assert tokenizer.decode(example.tokens.tolist()) == "Once upon a time" + tokenizer.eos_token
    assert example.supervised.all()


class Plain:
    """The same tokenizer without a chat template."""

    chat_template = None

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_without_a_chat_template_completions_follow_their_prompt(tokenizer):
    example = tokenize_one({"prompt": "2 + 2 =", "completion": " 4"}, Plain(tokenizer))
    assert tokenizer.decode(example.tokens.tolist()) == "2 + 2 = 4" + tokenizer.eos_token
    assert spans(tokenizer, example) == [" 4" + tokenizer.eos_token]
    with pytest.raises(InputError, match="need a chat template"):
        tokenize_one({"messages": TURN}, Plain(tokenizer))


def test_tools_reach_the_template(tokenizer):
    template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    template += (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or m.tool_calls }}<|im_end|>\n{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    messages = [
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "light"}]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Done."},
    ]
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        example = tokenize_one({"messages": messages, "tools": [{"name": "light"}]}, tokenizer)
    finally:
        tokenizer.chat_template = kept
    assert tokenizer.decode(example.tokens.tolist()).startswith("[light]<|im_start|>user")
    assert spans(tokenizer, example) == ["[{'name': 'light'}]<|im_end|>", "Done.<|im_end|>"]


def test_turns_may_end_with_another_token_than_texts(tokenizer):
    """As in base models, which end texts with <|endoftext|> and turns with <|im_end|>."""
    kept, tokenizer.eos_token_ids = tokenizer.eos_token_ids, {0}
    try:
        assert spans(tokenizer, tokenize_one({"messages": TURN}, tokenizer)) == ["Hello!<|im_end|>", "4<|im_end|>"]
    finally:
        tokenizer.eos_token_ids = kept


def test_a_template_that_renders_the_last_turn_otherwise_is_read_rightly(tokenizer):
    """As Qwen 3's, which writes an empty thought before the last answer only."""
    kept, ids = tokenizer.chat_template, tokenizer.eos_token_ids
    thought = "{% if m.role == 'assistant' and loop.last %}<think>\n{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + thought + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    try:
        expected = ["Hello!<|im_end|>", "<think>\n4<|im_end|>"]
        assert spans(tokenizer, tokenize_one({"messages": TURN}, tokenizer)) == expected
        tokenizer.eos_token_ids = {0}  # as in base models: a turn then ends with the special token after its content
        assert spans(tokenizer, tokenize_one({"messages": TURN}, tokenizer)) == expected
    finally:
        tokenizer.chat_template, tokenizer.eos_token_ids = kept, ids


def test_a_misspelt_role_is_shown(tokenizer):
    messages = [TURN[1], {"role": "Assistant", "content": "Hello!"}]
    with pytest.raises(InputError, match=r"no supervised tokens \(roles: user, Assistant\)"):
        tokenize_one({"messages": messages}, tokenizer)


def test_a_template_that_rewrites_history_is_read_rightly_or_refused_by_row(tokenizer):
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}" + kept
        assert spans(tokenizer, tokenize_one({"messages": TURN}, tokenizer)) == ["Hello!<|im_end|>", "4<|im_end|>"]
        turned = "{{ messages | length }}{% for m in messages %}"
        turned += "{{ m.content | reverse if m.role == 'user' else m.content }}<|im_end|>{% endfor %}"
        tokenizer.chat_template = turned
        with pytest.raises(InputError, match=r"rows.jsonl:1: the chat template renders .* message 3 differently"):
            tokenize_one({"messages": TURN}, tokenizer)
    finally:
        tokenizer.chat_template = kept


def test_long_rows_are_truncated_dropped_or_refused_and_always_listed(tokenizer):
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 50}]}
    hidden = {"messages": [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "yes"}]}
    rows = [Row(long, "f:1"), Row(hidden, "f:2"), Row({"messages": TURN}, "f:3")]
    length = tokenize_one({"messages": TURN}, tokenizer).tokens.size
    assert length < 60

    cut = data.tokenize(rows, tokenizer, options(max_seq_length=60))
    assert [example.tokens.size for example in cut.examples] == [60, length]
    assert [line.split(":")[1] for line in cut.truncated] == ["1"]
    assert [line.split(":")[1] for line in cut.skipped] == ["2"]  # nothing supervised is left: out, never 0/0
    assert "no supervised tokens are left" in cut.skipped[0]

    dropped = data.tokenize(rows, tokenizer, options(max_seq_length=60, on_overflow="drop"))
    assert [example.place for example in dropped.examples] == ["f:3"]
    assert dropped.read == len(dropped.examples) + len(dropped.skipped) == 3

    with pytest.raises(InputError, match=r"f:1: \d+ tokens(.|\n)*f:2: \d+ tokens"):
        data.tokenize(rows, tokenizer, options(max_seq_length=60, on_overflow="error"))


def test_rows_without_an_answer_are_skipped_and_listed(tokenizer):
    rows = [
        Row({"messages": TURN[:2]}, "f:1"),
        Row({"prompt": "Hi", "completion": ""}, "g:2"),
        Row({"messages": TURN}, "f:3"),
    ]
    dataset = data.tokenize(rows, tokenizer, options())
    assert [line.split(":")[1] for line in dataset.skipped] == ["1", "2"]
    assert dataset.account("train")[0].startswith("train: 3 rows read, 1 used, 0 truncated, 2 skipped")
    with pytest.raises(InputError, match="no row can be used"):
        data.tokenize(rows[:2], tokenizer, options())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"message": []}, "'message'"),
        ({"text": "a", "messages": TURN}, "data.format"),
        ({"text": 3}, "text is not a string"),
        ({"prompt": "a", "completion": None}, "completion is not a string"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 (user) has no text"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 (user) has no text"),
        ({"text": "\ud800"}, "Unicode"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
        ({"prompt": "\ud800", "completion": "a"}, "Unicode"),
        ({"messages": TURN, "tools": [{"name": "light"}]}, "leaves out tools"),
        (
            {"messages": [TURN[1], {"role": "assistant", "content": "", "tool_calls": [{"name": "light"}]}]},
            "leaves out tool_calls",
        ),
    ],
)
def test_rows_of_the_wrong_form_are_named_by_place(tokenizer, row, words):
    with pytest.raises(InputError) as caught:
        tokenize_one(row, tokenizer)
    assert str(caught.value).startswith("rows.jsonl:1: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "loss_on"),
    [
        ({"text": "a"}, "last"),
        ({"text": "a"}, "completion"),
        ({"messages": TURN}, "completion"),
        ({"prompt": "a", "completion": "b"}, "last"),
    ],
)
def test_a_loss_on_that_a_row_cannot_have_is_an_error(tokenizer, row, loss_on):
    with pytest.raises(InputError, match="loss_on"):
        tokenize_one(row, tokenizer, loss_on=loss_on)


def test_a_chosen_format_reads_rows_that_could_be_several(tokenizer):
    row = {"text": "Hi", "messages": TURN}
    assert spans(tokenizer, tokenize_one(row, tokenizer, format="text")) == ["Hi" + tokenizer.eos_token]
    assert len(spans(tokenizer, tokenize_one(row, tokenizer, format="messages"))) == 2


def test_files_of_both_kinds_hold_the_same_rows(tmp_path):
    rows = [{"text": "a"}, {"text": "b\u2028c"}, {"text": "ü"}]
    lines = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "dos.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    )
    for name in (lines, tmp_path / "rows.json", tmp_path / "dos.jsonl"):
        assert [row.content for row in data.read(name)] == rows
    assert [row.place.rsplit(":")[-1] for row in data.read(lines)] == ["1", "2", "3"]


def test_repeated_keys_are_refused_and_rows_of_a_list_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*a key stands twice"):
        data.read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text('[\n\n{"text": "a"},\n\n[]]')
    with pytest.raises(InputError, match=r"rows.json:row 2: is not a JSON object"):
        data.read(tmp_path / "rows.json")


def test_faulty_files_are_listed_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n{"text": NaN}\n"x"\n')
    with pytest.raises(InputError) as caught:
        data.read(path)
    lines = str(caught.value).splitlines()
    assert [line.strip().removeprefix(f"{path}:")[0] for line in lines] == ["2", "3", "4", "5"]
    path.write_text("{\n" * 50)
    with pytest.raises(InputError, match="and 30 more"):
        data.read(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        ('{"text": "ü"}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_are_no_rows_are_refused(tmp_path, content, words):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=words):
        data.read(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        data.read(tmp_path / "none.jsonl")


def rows_of(count: int) -> list[Row]:
    numbers = random.Random(0).sample(range(10**6), count)
    return [Row({"text": str(number)}, f"f:{line}") for line, number in enumerate(numbers, 1)]


def split(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    held_out = data.split(np.array([int(data.digest([row])[:16], 16) for row in rows], np.uint64), fraction)
    return tuple([row for row, out in zip(rows, held_out, strict=True) if out == side] for side in (False, True))


def test_held_out_rows_are_chosen_by_their_content_alone():
    rows = rows_of(2000)
    train, valid = split(rows, 0.1)
    assert len(train) + len(valid) == 2000
    assert 140 < len(valid) < 260  # binomial: 200 ± 4.5 deviations
    shuffled = random.Random(1).sample(rows, len(rows))
    assert {row.place for row in split(shuffled, 0.1)[1]} == {row.place for row in valid}
    grown = split(rows + rows_of(2500)[2000:], 0.1)[1]
    assert {row.place for row in valid} <= {row.place for row in grown}


def test_copies_of_a_row_stay_on_one_side():
    copies = [Row(row.content, f"copy:{row.place}") for row in rows_of(500)]
    train, valid = split(rows_of(500) + copies, 0.2)
    texts = [{row.content["text"] for row in side} for side in (train, valid)]
    assert not texts[0] & texts[1]
    assert len(valid) == 2 * len(texts[1])


def test_a_small_fraction_of_few_rows_still_holds_one_out(tokenizer, tmp_path):
    train, valid = split(rows_of(5), 0.01)
    assert (len(train), len(valid)) == (4, 1)
    assert split(rows_of(5), 0)[1] == []
    path = write(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(InputError, match="leaves no row"):
        data.load(Data(train=path, valid=0.5), tokenizer)


def test_digest_depends_on_rows_and_order():
    rows = rows_of(10)
    assert data.digest(rows) == data.digest([Row(row.content, "elsewhere") for row in rows])
    assert len({data.digest(rows), data.digest(rows[::-1]), data.digest(rows[:-1])}) == 3
