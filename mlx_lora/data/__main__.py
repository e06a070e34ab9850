"""python -m mlx_lora.data my.yaml: what a run would train on, and what is wrong with it; no weights are loaded."""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_lora import config_file, data, files, model
from mlx_lora.batches import train_batches
from mlx_lora.data import checks, page
from mlx_lora.data.checks import Finding
from mlx_lora.data.sources import MAX_LISTED
from mlx_lora.data.summary import Lengths, Shown, Summary, lengths, padding, shown, summary
from mlx_lora.errors import InputError, exit_code
from mlx_lora.metrics import PatientConsole

BAR = 40  # characters


def _main() -> None:
    options = _parser().parse_args()
    if options.rows < 0:
        raise InputError("--rows counts from 0")
    config = config_file.load(options.config, options.set)
    console = PatientConsole(highlight=False)
    for path in (*config.data.train_paths, *config.data.valid_paths):
        next(data.entries(path), None)  # one that cannot be read is named before a tokenizer is fetched
    tokenizer = model.load(config.model, weights=False).tokenizer
    train, valid = data.examine(config.data, tokenizer, console.print)
    findings = checks.check("train", train, tokenizer, config.data)
    if valid is not None:
        findings += checks.check("valid", valid, tokenizer, config.data)
        findings += checks.overlap(train, valid)
    findings.sort(key=lambda finding: not finding.spoils)
    sides = [summary(name, side) for name, side in (("train", train), ("valid", valid)) if side is not None]
    histogram = lengths(train) if len(train.order) else None
    notes = [padding(train_batches(config, train.examples))] if len(train.order) else []
    rows = shown(train, tokenizer, options.rows)
    spoiling = sum(finding.spoils for finding in findings)
    found = "1 finding" if len(findings) == 1 else f"{len(findings) or 'no'} findings"
    verdict = f"{found}, {spoiling or 'none'} that would spoil a run" if findings else found
    if options.html:
        with files.writing(Path(options.html).parent), files.new_file(Path(options.html)) as html:
            text = page.page(options.config, sides, histogram, notes, rows, findings, verdict)
            html.write_text(text, encoding="utf-8")
    _print(console, sides, histogram, notes, rows, findings)
    if options.html:
        console.print(f"the same as a page: {options.html}", markup=False, soft_wrap=True)
    if spoiling:
        raise InputError(f"{verdict}: those marked with !")
    console.print(verdict)


def _print(
    console: Console,
    sides: list[Summary],
    histogram: Lengths | None,
    notes: list[str],
    rows: list[Shown],
    findings: list[Finding],
) -> None:
    console.print(_sides(sides))
    if histogram is not None:
        console.print(f"\n{histogram.words}", soft_wrap=not console.is_terminal)
        for words, count in histogram.bars:
            bar = "█" * -(-BAR * count // max(count for _, count in histogram.bars))
            console.print(f"  {words:>16}  {bar:{BAR}} {count:>9,}", soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=not console.is_terminal)
    plain = not console.is_terminal or console.no_color
    if rows:
        mark = "in ⟦ ⟧" if plain else "in green"
        console.print(f"\nrows of train token by token, what is learned {mark}:", soft_wrap=True)
    for row in rows:
        console.print(f"\n{row.place}", style="bold", markup=False, soft_wrap=True)
        tokens = _tokens(row, plain)
        if console.is_terminal:
            console.print(Padding(tokens, (0, 0, 0, 2)))
        else:  # whole, however long its lines are
            console.print(tokens, soft_wrap=True)
    console.print()
    for finding in findings:
        for line, style in _lines(finding):
            if console.is_terminal:  # paths are left whole
                line = textwrap.fill(line, console.width, subsequent_indent="    ", break_long_words=False)
            console.print(line, style=style, markup=False, soft_wrap=True)


def _sides(sides: list[Summary]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("", *sides[0].counts):
        table.add_column(name, justify="left" if name in ("", "form") else "right", no_wrap=True)
    for side in sides:
        table.add_row(side.name, *side.counts.values())
    return table


def _tokens(row: Shown, plain: bool) -> Text:
    """A row with | between tokens; line ends are shown and kept."""
    text, inside = Text(), False
    for number, (word, learned) in enumerate(row.first + row.last):
        if row.between and number == len(row.first):
            text.append(f"\n... {row.between:,} tokens ...\n", "dim")
        if plain and learned != inside:
            text.append("⟦" if learned else "⟧")
        elif len(text) and not text.plain.endswith("\n"):
            text.append("|", "dim")
        inside = learned
        text.append(word.replace("\n", "⏎\n"), "bold green" if learned else "")
    if plain and inside:
        text.append("⟧")
    text.rstrip()
    return text


def _lines(finding: Finding) -> Iterator[tuple[str, str]]:
    yield f"{'!' if finding.spoils else '-'} {finding.text}", "bold red" if finding.spoils else "yellow"
    for place in finding.places[:MAX_LISTED]:
        yield f"    {place}", ""
    if len(finding.places) > MAX_LISTED:
        yield f"    ... and {len(finding.places) - MAX_LISTED:,} more", ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-lora data",
        description="Look at the rows that a run would train on: how many are used, how long they are, which tokens "
        "are learned, and what is wrong with them. Loads no weights. Exit code 2: something would spoil a run.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of options, as for mlx_lora.train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override an option; any number of times"
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows shown token by token (default 3)")
    parser.add_argument("--html", metavar="FILE", help="write the same as a page, too")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(_main))
