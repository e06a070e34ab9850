"""python -m mlx_lora.evaluate --adapter RUN: the loss of base and adapter on rows, and answers side by side."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_lora import adapter_files, config_file, data, generation, lora, model
from mlx_lora.batches import valid_batches
from mlx_lora.config import Data
from mlx_lora.data import Row
from mlx_lora.errors import InputError, exit_code
from mlx_lora.scoring import score


@dataclass(frozen=True)
class Question:
    """A row's last answer, and the prompt that asks for it."""

    prompt: list[int]
    text: str
    answer: str


def _main() -> None:
    options = _parser().parse_args()
    if options.answers < 0 or options.show < 0:
        raise InputError("--answers and --show count from 0")
    config = config_file.load(options.config or adapter_files.run_config(Path(options.adapter)), options.set)
    console = Console(highlight=False)
    for note in model.prepare_device():
        console.print(note)
    if options.data:
        config = config.model_copy(update={"data": config.data.model_copy(update={"valid": options.data})})
    if config.data.valid == 0:
        raise InputError("this run holds out no rows (data.valid: 0); name a file with --data")
    data.check(config.data, config.data.valid_paths)
    base = model.load(config.model)
    dataset = data.held_out(config.data, base.tokenizer, console.print)
    for line in dataset.account("rows"):
        console.print(line, markup=False, soft_wrap=True)
    batches = valid_batches(config, dataset.examples)
    rows = data.used_rows(dataset, config.data.valid_paths, config.data)
    questions = _questions(rows, base.tokenizer, config.data, options.answers) if options.answers else []

    adapter_files.load(base.model, options.adapter)
    answers: dict[str, list[str]] = {}
    for name, switch in (("base", lora.disable), ("tuned", lora.enable)):
        switch(base.model)
        result = score(base.model, batches)
        line = f"{name:5}  loss {result.loss:.4f}  perplexity {result.perplexity:9.3f}"
        if questions:
            answers[name] = _answers(base, questions)
            right = sum(given == question.answer for given, question in zip(answers[name], questions, strict=True))
            line += f"  exactly right {right} of {len(questions)} ({100 * right / len(questions):.0f} %)"
        console.print(line, soft_wrap=True)
    if questions:
        console.print(_side_by_side(questions[: options.show], answers))


def _questions(rows: Iterable[Row], tokenizer: Any, config: Data, limit: int) -> list[Question]:
    """The last answers of the first `limit` rows that have one."""
    questions: list[Question] = []
    for row in rows:
        if len(questions) == limit:
            break
        found = data.last_answer(row.content, config)
        if found is not None:
            messages, tools, answer = found
            text = messages[-1].get("content") or ""
            if tokenizer.chat_template is None:
                prompt = generation.prompt_tokens(tokenizer, text)
            else:
                prompt = generation.chat_prompt(tokenizer, messages, tools)
            questions.append(Question(prompt, text, answer.strip()))
    if not questions:
        raise InputError("--answers needs rows that end with an answer")
    return questions


def _answers(base: model.Base, questions: list[Question]) -> list[str]:
    """Greedy answers, cut a little beyond the longest expected one."""
    longest = max(len(base.tokenizer.encode(question.answer)) for question in questions)
    prompts = [question.prompt for question in questions]
    return [text.strip() for text in generation.answers(base.model, base.tokenizer, prompts, longest + 8)]


def _side_by_side(questions: list[Question], answers: dict[str, list[str]]) -> Table:
    table = Table(show_lines=True)
    for heading in ("prompt", "base", "tuned"):
        table.add_column(heading, overflow="fold")
    for number, question in enumerate(questions):
        table.add_row(*map(Text, (question.text, answers["base"][number], answers["tuned"][number])))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora evaluate",
        description="Score base and adapter on held-out rows: loss, perplexity and, with --answers, exact answers.",
    )
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="a run's folder or a checkpoint")
    parser.add_argument("--config", metavar="FILE", help="default: the config.yaml of the adapter's run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override an option")
    parser.add_argument("--data", metavar="FILE", help="rows to score; default: the run's validation rows")
    parser.add_argument("--answers", type=int, default=0, metavar="N", help="also answer N rows greedily")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers shown side by side (default 3)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
