"""Modelfiles: the template in Ollama's language against the chat template.

Ollama itself is not run here. The three templates spelled out below were rendered once by Go's text/template, after a
transcription of how Ollama reads a Modelfile, and gave what the chat templates give for all of `ollama.SAMPLES`.
"""

import random
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_gguf_base import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_lora import chat, ollama

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# As Qwen2.5 has it, without its tools
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'system' %}<<SYS>>{{ message['content'] }}<</SYS>>"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Text that Go's templates and Modelfiles would take for their own, and that a Modelfile loses
AWKWARD = (
    "{% for message in messages %}{% if message.role == 'user' %}`{{ '{{ .X }}' }} \"{{ message.content }}\"\n"
    "{% elif message.role == 'system' %}\u00a0\u200b😀\\n{{ message.content }}{{ '\\r' }}\n"
    '{% else %}{{ \'{\' }}{{ message.content }}}"""\t{% endif %}{% endfor %}'
    "{% if add_generation_prompt %}{{ '{' }}{% endif %}"
)
EXPRESSIBLE = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "awkward": AWKWARD}
INEXPRESSIBLE = {
    "trims": CHATML.replace("message['content']", "message['content'] | trim"),
    "trims questions": CHATML.replace(
        "message['content']", "(message['content'] | trim if message.role == 'user' else message['content'])"
    ),
    "drops thoughts": CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
    "drops earlier turns": CHATML.replace("in messages", "in messages[-2:]"),
    "marks the last turn": CHATML.replace("'<|im_end|>\n'", "('<|im_end|>\n' if loop.last else '<|im_end|>')"),
    "numbers turns": CHATML.replace("'<|im_start|>'", "'<|im_start|>' + loop.index | string"),
    "joins system and user": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
        + CHATML.replace("message['content']", "first ~ message['content']")
    ),
    "refuses system messages": CHATML.replace(
        "{{ '<|im_start|>'", "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ '<|im_start|>'"
    ),
    "leaves out system messages": CHATML.replace("in messages", "in messages if message.role != 'system'"),
    "leaves out empty answers": CHATML.replace("in messages", "in messages if message.content"),
    "repeats the question": CHATML.replace("message['content']", "message['content'] + message['content']"),
    "names the day": "{{ strftime_now('%Y') }}" + CHATML,
}


def tokenizer_of(template: str | None, adds_bos: bool = False, eos: str = "<|im_end|>") -> TokenizerWrapper:
    special = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos[0], eos_token=eos, chat_template=template
    )
    return TokenizerWrapper(wrapped)


def test_chatml_with_a_default_system_message(tokenizer: Any) -> None:
    """SmolLM2's own."""
    text, notes = ollama.modelfile("model.gguf", None, tokenizer)
    assert notes == []
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (ne .Role "system") }}<|im_start|>system\n'
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        '{{ end }}{{ if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_what_go_or_a_modelfile_would_take_for_its_own_is_quoted() -> None:
    text, _ = ollama.modelfile("model.gguf", None, tokenizer_of(AWKWARD))
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
        r'{{ "\U000000a0\U0000200b😀\U0000005cn" }}{{ .Content }}{{ "\U0000000d\U0000000a" }}'
        r'{{ else if eq .Role "user" }}{{ "`{{ .X }} \U00000022" }}{{ .Content }}"'
        '\n{{ else if eq .Role "assistant" }}'
        r'{{ "{" }}{{ .Content }}{{ "}\U00000022\U00000022\U00000022\U00000009" }}'
        r'{{ end }}{{ end }}{{ "{" }}"""'
        '\nPARAMETER stop "<|im_end|>"\n'
    )


def test_the_bos_that_llama_cpp_adds_is_not_in_the_template() -> None:
    text, notes = ollama.modelfile("model.gguf", None, tokenizer_of(LLAMA3, adds_bos=True, eos="<|eot_id|>"))
    assert notes == []
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
        "<|start_header_id|>system<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
        '{{ else if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        "{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
        '"""\n'
        'PARAMETER stop "<|eot_id|>"\n'
    )
    assert "<|begin_of_text|>" in ollama.modelfile("model.gguf", None, tokenizer_of(LLAMA3))[0]
    _, notes = ollama.modelfile("model.gguf", None, tokenizer_of(CHATML, adds_bos=True))
    assert notes == [
        "Ollama puts <|begin_of_text|> before the text; the chat template, with which training went, does not"
    ]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_fixed_text_around_contents_says_what_the_chat_template_says(name: str) -> None:
    tokenizer = tokenizer_of(EXPRESSIBLE[name])
    turns = ollama._turns(tokenizer)
    assert turns is not None
    choose = random.Random(0)
    for _ in range(50):
        roles = ["system"] * choose.randrange(2) + ["user", "assistant"] * choose.randrange(4) + ["user"]
        messages = [{"role": role, "content": choose.choice(TEXTS)} for role in roles]
        assert turns.render(messages) == chat.render(messages, tokenizer, add_generation_prompt=True)


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_a_template_that_does_more_is_left_to_ollama(name: str) -> None:
    text, notes = ollama.modelfile("model.gguf", None, tokenizer_of(INEXPRESSIBLE[name]))
    assert text == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'
    assert notes == ["no TEMPLATE: the chat template does more than one of Ollama's can; Ollama looks for its own"]


def test_an_adapter_stop_tokens_and_tools() -> None:
    text, notes = ollama.modelfile("base.gguf", "adapter.gguf", tokenizer_of(None))
    assert text == (
        "FROM ./base.gguf\n"
        "# Ollama 0.34.1 and later take no adapters: give them a merged file.\n"
        "ADAPTER ./adapter.gguf\n"
        'PARAMETER stop "<|im_end|>"\n'
    )
    assert notes == ["no TEMPLATE: the model has no chat template"]
    tools = "{% if tools %}{{ tools }}{% endif %}" + CHATML
    text, notes = ollama.modelfile("base.gguf", None, tokenizer_of(tools, eos="<|eot_id|>"))
    assert text.endswith('PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|im_end|>"\n')
    assert notes == ["TEMPLATE has no place for tools; the chat template has"]
