"""Masks under the chat templates of real models: spelt out, and compared with the marks that trl put there."""

import copy
import re

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_lora import chat
from mlx_lora.errors import InputError

USER = {"role": "user", "content": "Hi"}
TURNS = [USER, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "2 + 2?"}]
TURNS += [{"role": "assistant", "content": "4"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "four", "tool_call_id": "a1b2c3d4e", "name": "add"},
    {"role": "assistant", "content": "It is 4."},
]
# Mistral's form, in our words: trl has none of its templates. As in Mistral 7B v0.3, a system prompt is written in the
# last message if that is the user's: in the prompt for an answer, and not in a conversation that has it.
MISTRAL = """{{ bos_token }}{% set turns = messages[1:] if messages[0].role == "system" else messages -%}
{% for m in turns -%}
{% if m.role == "user" -%}
{% if tools and (turns | selectattr("role", "equalto", "user") | list | last) == m -%}
[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif -%}
[INST] {% if loop.last and messages[0].role == "system" %}{{ messages[0].content }}\n\n{% endif -%}
{{ m.content }}[/INST]
{%- elif m.role == "tool" -%}
[TOOL_RESULTS] {{ {"content": m.content, "call_id": m.tool_call_id} | tojson }}[/TOOL_RESULTS]
{%- elif m.tool_calls -%}
[TOOL_CALLS] [{% for call in m.tool_calls -%}
{{ (call.function | tojson)[:-1] }}, "id": {{ call.id | tojson }}}{{ ", " if not loop.last }}
{%- endfor %}]{{ eos_token }}
{%- else %}{{ " " + m.content | trim + eos_token }}
{%- endif %}{% endfor %}"""
# What generation stops at, and what the model writes of TURNS.
WRITTEN = {
    "llama3": ("<|eot_id|>", ["Hello!<|eot_id|>", "4<|eot_id|>"]),
    "llama3_1": ("<|eot_id|>", ["Hello!<|eot_id|>", "4<|eot_id|>"]),
    "llama3_2": ("<|eot_id|>", ["Hello!<|eot_id|>", "4<|eot_id|>"]),
    "qwen2_5": ("<|im_end|>", ["Hello!<|im_end|>", "4<|im_end|>"]),
    "qwen3": ("<|im_end|>", ["Hello!<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]),
    "qwen3_instruct_2507": ("<|im_end|>", ["Hello!<|im_end|>", "4<|im_end|>"]),
    "mistral": ("</s>", [" Hello!</s>", " 4</s>"]),
    "phi3": ("<|endoftext|>", ["Hello!<|end|>", "4<|end|>\n<|endoftext|>"]),
    "phi3_5": ("<|endoftext|>", ["Hello!<|end|>", "4<|end|>\n<|endoftext|>"]),
    "gemma": ("<end_of_turn>", ["Hello!<end_of_turn>", "4<end_of_turn>"]),
    "gemma3": ("<end_of_turn>", ["Hello!<end_of_turn>", "4<end_of_turn>"]),
    "deepseekv3": (
        "<\uff5cend▁of▁sentence\uff5c>",
        ["Hello!<\uff5cend▁of▁sentence\uff5c>", "4<\uff5cend▁of▁sentence\uff5c>"],
    ),
    "nemotron_3_nano": ("<|im_end|>", ["Hello!<|im_end|>", "4<|im_end|>"]),
    "gptoss": (
        "<|return|>",
        ["<|channel|>final<|message|>Hello!<|end|>", "<|channel|>final<|message|>4<|return|>"],
    ),
}
NO_SYSTEM = {"gemma", "mistral"}
SPECIAL = re.compile(r"<[|\uff5c][^<>\s']{1,40}?[|\uff5c]>|</?s>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|<\|?turn\|?>")


@pytest.fixture(scope="module")
def chat_templates(chat_templates):
    return chat_templates | {"mistral": MISTRAL}


def tokenizer_of(template: str, end: str, start: str = "<bos>") -> TokenizerWrapper:
    """A tokenizer of bytes with a template's control tokens, as training loads one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = sorted({*SPECIAL.findall(template), start, end})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=start, eos_token=end, chat_template=template)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return TokenizerWrapper(tokenizer)


def spans(tokenizer, messages, loss_on="assistant", tools=None) -> list[str]:
    """The supervised stretches of a conversation, as text."""
    tokens, supervised = chat.tokenize({"messages": messages, "tools": tools}, tokenizer, loss_on)
    assert tokens == tokenizer.apply_chat_template(messages, tools=tools)
    return stretches(tokenizer, tokens, supervised)


def stretches(tokenizer, tokens, supervised) -> list[str]:
    found, inside = [], False
    for token, on in zip(tokens, supervised, strict=True):
        if on and inside:
            found[-1].append(token)
        elif on:
            found.append([token])
        inside = on
    return [tokenizer.decode(stretch) for stretch in found]


@pytest.mark.parametrize("name", list(WRITTEN))
@pytest.mark.parametrize("with_system", [False, True])
def test_supervised_is_what_the_model_writes(chat_templates, name, with_system):
    end, written = WRITTEN[name]
    tokenizer = tokenizer_of(chat_templates[name], end)
    messages = [SYSTEM] * (with_system and name not in NO_SYSTEM) + TURNS
    assert spans(tokenizer, messages) == written
    assert spans(tokenizer, messages, "last") == written[-1:]


@pytest.mark.parametrize("name", list(WRITTEN))
def test_an_answer_can_be_left_out(chat_templates, name):
    end, written = WRITTEN[name]
    tokenizer = tokenizer_of(chat_templates[name], end)
    for flag in ({"train": False}, {"weight": 0}):
        row = {"messages": [TURNS[0], TURNS[1] | flag, *TURNS[2:]]}
        tokens, supervised = chat.tokenize(row, tokenizer, "assistant")
        assert tokens == tokenizer.apply_chat_template(TURNS)
        assert stretches(tokenizer, tokens, supervised) == written[1:]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma", "gemma3", "phi3", "phi3_5"])
@pytest.mark.parametrize("with_system", [False, True])
def test_supervised_is_what_trl_marks(chat_templates, name, with_system):
    """trl's marks take in the line ends around an answer, in some templates."""
    end = WRITTEN[name][0]
    messages = [SYSTEM] * (with_system and name not in NO_SYSTEM) + TURNS
    marked = tokenizer_of(chat_templates[f"{name}_training"], end)
    theirs = (
        marked.apply_chat_template(messages, tokenize=False),
        marked._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True),
    )
    tokenizer = tokenizer_of(chat_templates[name], end)
    assert theirs[0] == tokenizer.apply_chat_template(messages, tokenize=False)
    mask = [bool(on) for on in theirs[1]["assistant_masks"]]
    expected = stretches(marked, theirs[1]["input_ids"], mask)
    assert [span.strip() for span in spans(tokenizer, messages)] == [span.strip() for span in expected]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (
            "qwen2_5",
            ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>', "It is 4.<|im_end|>"],
        ),
        (
            "qwen3",
            [
                '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
            ],
        ),
        ("mistral", ['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "a1b2c3d4e"}]</s>', " It is 4.</s>"]),
        ("llama3_1", ['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is 4.<|eot_id|>"]),
    ],
)
def test_tool_calls_are_written_by_the_model_and_their_results_are_not(chat_templates, name, written):
    tokenizer = tokenizer_of(chat_templates[name], WRITTEN[name][0])
    found = spans(tokenizer, CALLS, tools=[TOOL])
    assert [span.strip() for span in found] == [span.strip() for span in written]


def test_arguments_as_openai_sends_them_are_read_as_an_object(chat_templates):
    tokenizer = tokenizer_of(chat_templates["qwen2_5"], "<|im_end|>")
    as_text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    row = {"messages": [CALLS[0], CALLS[1] | {"tool_calls": [as_text]}, *CALLS[2:]], "tools": [TOOL]}
    tokens, _ = chat.tokenize(row, tokenizer, "assistant")
    assert tokens == tokenizer.apply_chat_template(CALLS, tools=[TOOL])


THOUGHTS = [
    USER,
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two more than two."},
]


def test_a_template_that_drops_earlier_thoughts(chat_templates):
    """Qwen 3's keeps the last thought only, which is what the model sees in use."""
    tokenizer = tokenizer_of(chat_templates["qwen3"], "<|im_end|>")
    written = ["Hello!<|im_end|>", "<think>\nTwo more than two.\n</think>\n\n4<|im_end|>"]
    assert spans(tokenizer, THOUGHTS) == written


def test_thoughts_between_tool_calls_stay(chat_templates):
    tokenizer = tokenizer_of(chat_templates["qwen3"], "<|im_end|>")
    messages = [CALLS[0], CALLS[1] | {"reasoning_content": "I add."}, *CALLS[2:]]
    called, answered = spans(tokenizer, messages, tools=[TOOL])
    assert called.startswith("<think>\nI add.\n</think>\n\n<tool_call>")
    assert answered == "<think>\n\n</think>\n\nIt is 4.<|im_end|>"


def test_a_setting_of_the_template_changes_prompts_and_answers_alike(chat_templates):
    """Without thinking, Qwen 3's prompts open an empty thought that earlier answers do not have."""
    tokenizer = tokenizer_of(chat_templates["qwen3"], "<|im_end|>")
    chat.configure(tokenizer, None, {"enable_thinking": False})
    assert spans(tokenizer, TURNS) == ["Hello!<|im_end|>", "4<|im_end|>"]
    assert chat.render(TURNS[:1], tokenizer, add_generation_prompt=True).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("value", [True, None, 3, "a 'b' \"c\"\n%}é", [1, {"a": None}]])
def test_settings_reach_the_template_as_they_are(value):
    tokenizer = tokenizer_of("{{ given | tojson }}", "</s>")
    given = tokenizer._tokenizer.apply_chat_template([USER], tokenize=False, given=value)
    chat.configure(tokenizer, None, {"given": value})
    assert chat.render([USER], tokenizer) == given


def test_reasoning_that_a_template_leaves_out_is_an_error(chat_templates):
    tokenizer = tokenizer_of(chat_templates["qwen2_5"], "<|im_end|>")
    with pytest.raises(InputError, match=r"leaves out the reasoning of the last answer.*data\.reasoning"):
        spans(tokenizer, THOUGHTS)
    tokenizer = tokenizer_of(chat_templates["deepseekv3"], "<\uff5cend▁of▁sentence\uff5c>")
    with pytest.raises(InputError, match="leaves out the reasoning"):
        spans(tokenizer, THOUGHTS[:2])


def test_text_that_looks_like_an_end_of_turn_does_not_end_one(chat_templates):
    tokenizer = tokenizer_of(chat_templates["qwen2_5"], "<|im_end|>")
    messages = [USER, {"role": "assistant", "content": "It is <|im_end|> that ends."}]
    assert spans(tokenizer, messages) == ["It is <|im_end|> that ends.<|im_end|>"]


def test_spaces_around_contents_are_written_as_the_template_does(chat_templates):
    messages = [{**message, "content": f" {message['content']}\n"} for message in TURNS]
    assert spans(tokenizer_of(chat_templates["llama3"], "<|eot_id|>"), messages) == WRITTEN["llama3"][1]
    as_they_are = [" Hello!\n<|im_end|>", " 4\n<|im_end|>"]
    assert spans(tokenizer_of(chat_templates["qwen2_5"], "<|im_end|>"), messages) == as_they_are


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content[:3] }}</s>{% endfor %}", "changes the content of mess"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}",
            r"leaves out .* message 2 \(assistant\)",
        ),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}", "leaves it out or repeats it"),
    ],
)
def test_what_cannot_be_told_apart_is_an_error(template, words):
    with pytest.raises(InputError, match=words):
        spans(tokenizer_of(template, "</s>"), TURNS)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_system_prompt_that_a_template_leaves_out_is_an_error(chat_templates, loss_on):
    for template in (chat_templates["mistral"], chat_templates["phi3"].replace("'system'", "'none'")):
        tokenizer = tokenizer_of(template, "</s>")
        with pytest.raises(InputError, match=r"leaves out the content of message 1 \(system\)"):
            spans(tokenizer, [SYSTEM, *TURNS], loss_on)


def test_under_every_template_answers_are_found_or_refused(chat_templates):
    """Whatever the template: what is supervised holds each answer whole, and nothing that others said."""
    refused = {}
    for name, template in chat_templates.items():
        tokenizer = tokenizer_of(template, "<eos>")
        try:
            found = spans(tokenizer, TURNS)
        except InputError as error:
            refused[name] = str(error)
            continue
        assert len(found) == 2, name
        assert "Hello!" in found[0], name
        assert "4" in found[1], name
        assert not re.search(r"Hi|2 \+ 2", "".join(found)), name
    # These are for pictures, and take no content that is a text.
    assert set(refused) == {
        f"{name}{kind}" for name in ("idefics3", "llava_next", "smolvlm") for kind in ("", "_training")
    }


def test_a_token_of_the_prompt_s_end_and_the_answer_s_beginning_is_learned(tokenizer):
    """SmolLM2's own tokens: a space, or line ends, go into one with what follows."""
    template = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>"
    template += "{% else %}\\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    for asked, answer in ((changed, "Hello"), (changed, "The answer is forty-two."), (tokenizer, "    code")):
        row = {"messages": [USER, {"role": "assistant", "content": answer}]}
        tokens, supervised = chat.tokenize(row, asked, "assistant")
        learned = asked.decode([token for token, is_learned in zip(tokens, supervised, strict=True) if is_learned])
        assert answer.strip() in learned
        assert "SSISTANT" not in learned
