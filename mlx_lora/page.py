"""The report of one or several runs: one HTML file that needs nothing else, no network either."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mlx_lora import __version__, charts, config_file, files, metrics
from mlx_lora.charts import Curve, Point, written
from mlx_lora.config import Config, Options
from mlx_lora.display import clock
from mlx_lora.errors import InputError

FILE = "report.html"
GENERATOR = '<meta name="generator" content="mlx_lora'
COLOURS = 6  # of the style sheet, beside grey
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SMOOTH_FROM = 60  # reports, from which on the training loss has a running mean
Event = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run's folder tells of it."""

    name: str
    config: Config
    events: list[Event]
    facts: Event  # of the newest start; empty for the runs of earlier versions

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    def points(self, kind: str, name: str, share: float = 1.0) -> list[Point]:
        """(step, value times `share`) of each event of a kind."""
        return [
            (event["step"], None if (value := number(event, name)) is None else value * share)
            for event in self.of(kind)
        ]

    @property
    def best(self) -> Event | None:
        """The evaluation with the least loss."""
        scored = [event for event in self.of("eval") if number(event, "loss") is not None]
        return min(scored, key=lambda event: event["loss"], default=None)


def read(folder: Path) -> Run:
    """Raises InputError where the folder holds no run."""
    if not (folder / metrics.FILE).is_file():
        raise InputError(f"{folder}: holds no {metrics.FILE}; name the folder of a run")
    events = [event for _, event in metrics.events(folder / metrics.FILE)]
    loaded = config_file.load(folder / config_file.RUN_CONFIG)
    starts = [event for event in events if event["event"] == "start"]
    return Run(folder.resolve().name, loaded, events, starts[-1] if starts else {})


def write(path: Path, runs: Sequence[Run]) -> None:
    """Writes the page; an earlier one is replaced. Raises InputError where something else stands there."""
    if path.is_file() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"{path}: is there already and is no report of a run; choose another file with --out")
    try:
        text = page(runs)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as error:  # of times and figures
        names = ", ".join(run.name for run in runs)
        raise InputError(f"{names}: {metrics.FILE} is not as a run writes it ({error!r}); restore it") from None
    try:
        with files.new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place with --out") from None


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    several = len(runs) > 1
    drawn = [found for found in (_compared_charts(runs) if several else _charts(runs[0])) if found is not None]
    figures = "".join(charts.figure(found, place) for place, found in enumerate(drawn))
    title = f"{len(runs)} runs compared" if several else runs[0].name
    parts = [
        f"<header><p>mlx_lora</p><h1>{escape(title)}</h1>{'' if several else _lead(runs[0])}</header>",
        _overview(runs) if several else _notices(runs[0]) + _tiles(_figures(runs[0])),
        f'<section class="charts">{figures}</section>' if figures else "",
        _samples(runs),
        *([_differences(runs)] if several else [_data(runs[0]), _settings(runs[0].config), _events(runs[0])]),
        f"<footer>mlx_lora {escape(__version__)}, {time.strftime('%Y-%m-%d %H:%M')}</footer>",
    ]
    numbers = json.dumps([found.numbers() for found in drawn], separators=(",", ":")).replace("<", "\\u003c")
    style, script = (Path(__file__).with_suffix(kind).read_text("utf-8") for kind in (".css", ".js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Whatever a sample holds, no browser loads or runs anything for it.
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'\">\n"
        f'{GENERATOR} {escape(__version__)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f'\n<script type="application/json" id="numbers">{numbers}</script>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )


# ---- one run ---------------------------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    model, rows = run.config.model.path, run.config.data.train_paths
    data = _short(rows[0]) + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
    begun = f"begun {time.strftime('%d %B %Y, %H:%M', time.localtime(run.events[0]['time']))}" if run.events else ""
    device = f" on {run.facts['device']}" if isinstance(run.facts.get("device"), str) else ""
    return (
        f'<p class="lead"><code>{escape(_short(model))}</code> on <code>{escape(data)}</code></p>'
        f'<p class="lead"><span class="state {_state(run)[1]}">{escape(_state(run)[0])}</span>'
        f"{escape(begun + device)}</p>"
    )


def _state(run: Run) -> tuple[str, str]:
    """How far the run is, and the class of the style sheet for it."""
    done, steps = last_step(run), run.facts.get("steps")
    if run.of("early_stop"):
        return f"stopped early at step {done}", "good"
    if not isinstance(steps, int):
        return f"{done:,} steps" if done else "not begun", "open"
    if done < steps:
        return f"{done:,} of {steps:,} steps", "open"
    return "finished", "good"


def _notices(run: Run) -> str:
    """What a person should not overlook."""
    found = [event for event in run.events if event["event"] in ("skipped", "not_saved", "early_stop")]
    lines = [f"<li>{escape(str(event.get('text', event['event'])))}</li>" for event in found[-10:]]
    more = f"<li>and {len(found) - 10} earlier ones</li>" if len(found) > 10 else ""
    return f'<ul class="notices">{"".join(lines)}{more}</ul>' if lines else ""


def _figures(run: Run) -> dict[str, tuple[str, str]]:
    """The run in figures: label: value, words below it."""
    found: dict[str, tuple[str, str]] = {}
    if best := run.best:
        first = next(event for event in run.of("eval") if number(event, "loss") is not None)
        found["validation loss"] = (
            f"{best['loss']:.4f}",
            f"best, at step {best['step']}; {first['loss']:.4f} at the start",
        )
    reports = run.of("train")
    if not reports:
        return found
    last, first = reports[-1], reports[0]
    if (loss := number(last, "loss")) is not None:
        begin = number(first, "loss")
        found["training loss"] = f"{loss:.4f}", "" if begin is None else f"{begin:.4f} at step {first['step']}"
    per_epoch = run.facts.get("steps_per_epoch")
    epochs = f"{last['step'] / per_epoch:.3g} epochs" if isinstance(per_epoch, int) and per_epoch else ""
    found["steps"] = f"{last_step(run):,}", epochs
    seconds, tokens = number(last, "seconds"), number(last, "tokens")
    if seconds is not None:
        found["training time"] = clock(seconds), "without evaluations"
    if tokens is not None:
        supervised = number(last, "supervised_tokens")
        found["tokens"] = written(tokens, "si"), f"{written(supervised, 'si')} supervised" if supervised else ""
        if seconds:
            found["speed"] = f"{written(tokens / seconds, 'si')}/s", "tokens, on average"
    peaks = [value for _, value in run.points("train", "peak_memory", 1e-9) if value is not None]
    if peaks:
        found["peak memory"] = f"{max(peaks):.3g} GB", "in MLX"
    trainable, parameters = run.facts.get("trainable"), run.facts.get("parameters")
    if isinstance(trainable, int) and isinstance(parameters, int) and parameters:
        found["adapter"] = written(trainable, "si"), f"parameters, {100 * trainable / parameters:.2g} % of all"
    return found


def _tiles(figures: dict[str, tuple[str, str]]) -> str:
    tiles = [
        f"<div><dt>{escape(label)}</dt><dd><b>{escape(value)}</b>{escape(words)}</dd></div>"
        for label, (value, words) in figures.items()
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _charts(run: Run) -> list[charts.Chart | None]:
    losses = run.points("train", "loss")
    over = max(5, len(losses) // 20)
    training = [Curve("training", losses, 0)]
    if len(losses) >= SMOOTH_FROM:
        training = [
            Curve("training", losses, 0, "faint"),
            Curve(f"mean of {over} reports", charts.running_mean(losses, over), 0),
        ]
    best = [Curve("best, kept", [(run.best["step"], run.best["loss"])], 1, "mark")] if run.best else []
    norms = run.points("train", "gradient_norm")
    limit, last = run.config.train.max_grad_norm, last_step(run)
    clipped = []
    if limit is not None and any(value is not None and value > limit for _, value in norms):
        clipped = [Curve(f"clipped to {limit:g}", [(0, limit), (last, limit)], 6, "dashed")]
    return [
        charts.chart(
            "Loss",
            "nats per supervised token",
            [*training, Curve("validation", run.points("eval", "loss"), 1, "dotted"), *best],
            from_zero=False,
        ),
        charts.chart("Learning rate", "", [Curve("rate", run.points("train", "learning_rate"), 0)], "power"),
        charts.chart(
            "Gradient norm",
            "before clipping",
            [Curve("norm", norms, 0), *clipped],
        ),
        charts.chart(
            "Throughput",
            "tokens per second",
            [
                Curve("all", run.points("train", "tokens_per_second"), 0),
                Curve("supervised", run.points("train", "supervised_tokens_per_second"), 2),
            ],
            "si",
        ),
        charts.chart(
            "Memory",
            "GB, in MLX",
            [
                Curve("peak", run.points("train", "peak_memory", 1e-9), 0),
                Curve("between steps", run.points("train", "active_memory", 1e-9), 2),
            ],
        ),
    ]


def _samples(runs: Sequence[Run]) -> str:
    """Each prompt with the base's answer beside those of the adapters that were kept; then every answer by step."""
    prompts = list(dict.fromkeys(str(event.get("prompt")) for run in runs for event in run.of("sample")))
    cards = []
    for prompt in prompts:
        answers: list[str] = []
        by_step: list[str] = []
        for place, run in enumerate(runs):
            found = [event for event in run.of("sample") if event.get("prompt") == prompt]
            if not found:
                continue
            base = found[-1].get("base")
            if isinstance(base, str) and not answers:
                answers.append(_answer("base", base, 6))
            best = run.best["step"] if run.best else None
            kept = next((event for event in found if event["step"] == best), found[-1])
            name = run.name if len(runs) > 1 else "tuned"
            at = f"{name}, step {kept['step']}{' (best)' if kept['step'] == best else ''}"
            answers.append(_answer(at, str(kept.get("answer")), place % COLOURS))
            by_step += [
                f"<li><b>{'' if len(runs) == 1 else escape(run.name) + ', '}step {event['step']}</b>"
                f'<pre dir="auto">{_text(str(event.get("answer")))}</pre></li>'
                for event in found
            ]
        cards.append(
            f'<article><h3><pre dir="auto">{_text(prompt)}</pre></h3><div class="answers">{"".join(answers)}</div>'
            f"<details><summary>{len(by_step)} answers by step</summary><ol>{''.join(by_step)}</ol></details></article>"
        )
    return f"<section><h2>Samples</h2>{''.join(cards)}</section>" if cards else ""


def _answer(name: str, text: str, colour: int) -> str:
    return f'<div class="answer c{colour}"><h4>{escape(name)}</h4><pre dir="auto">{_text(text)}</pre></div>'


def _data(run: Run) -> str:
    data = run.facts.get("data")
    sets = {name: facts for name, facts in data.items() if isinstance(facts, dict)} if isinstance(data, dict) else {}
    cards = []
    for name, facts in sets.items():
        rows = {
            "rows read": f"{facts['read']:,}",
            "used": f"{facts['used']:,}",
            "truncated": f"{facts['truncated']:,}",
            "skipped": f"{facts['skipped']:,}",
            "tokens": f"{facts['tokens']:,}",
            "supervised": f"{facts['supervised']:,} ({100 * facts['supervised'] / max(1, facts['tokens']):.0f} %)",
        }
        listed = "".join(f"<li>{escape(str(line))}</li>" for line in facts["listed"])
        cards.append(
            f"<article><h3>{'training' if name == 'train' else 'validation'}</h3>{_list(rows)}"
            f"{_histogram(facts['lengths'])}"
            + (f"<details><summary>rows truncated or skipped</summary><ul>{listed}</ul></details>" if listed else "")
            + "</article>"
        )
    padding = run.facts.get("padding_efficiency")
    note = f"<p>{100 * padding:.0f} % of the computed tokens are real ones, the others padding.</p>" if padding else ""
    return f'<section><h2>Data</h2>{note}<div class="columns">{"".join(cards)}</div></section>' if cards else ""


def _histogram(lengths: dict[str, list[float]]) -> str:
    """How many rows have how many tokens, as bars."""
    edges, rows = lengths["edges"], lengths["rows"]
    most = max(rows)
    bars = "".join(
        f'<span style="height:{100 * count / most:.1f}%" title="{count:,} rows, {low:.0f} to {high:.0f} tokens"></span>'
        for count, low, high in zip(rows, edges, edges[1:], strict=False)
    )
    return (
        f'<figure class="bars"><figcaption><b>Length</b> <i>rows by tokens; the highest bar is {most:,} rows</i>'
        f'</figcaption><div class="bar">{bars}</div><div class="ends"><span>{edges[0]:,.0f}</span>'
        f"<span>{edges[-1]:,.0f} tokens</span></div></figure>"
    )


def _settings(loaded: Config) -> str:
    """Every option, those that are not the default set off."""
    groups: dict[str, dict[str, tuple[str, bool]]] = {}
    for key, (value, changed) in _options(loaded).items():
        group, _, name = key.partition(".")
        groups.setdefault(group if name else "run", {})[name or group] = value, changed
    cards = [
        f'<article><h3>{escape(group)}</h3><dl class="list">'
        + "".join(
            f"<div{' class=changed' if changed else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, (value, changed) in options.items()
        )
        + "</dl></article>"
        for group, options in groups.items()
    ]
    return (
        f'<section><h2>Settings</h2><p>Bold: not the default.</p><div class="settings">{"".join(cards)}</div></section>'
    )


def _options(group: Options, prefix: str = "", changed: bool = False) -> dict[str, tuple[str, bool]]:
    """Each option that is in force, and whether it, or the kind of its group, is not the default."""
    found: dict[str, tuple[str, bool]] = {}
    for name, field in type(group).model_fields.items():
        value, default = getattr(group, name), field.get_default()
        if isinstance(value, Options):
            other_kind = default is None or (isinstance(default, Options) and type(value) is not type(default))
            found |= _options(value, f"{prefix}{name}.", other_kind)
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[prefix + name] = shown, changed or value != default
    return found


def _events(run: Run) -> str:
    told = [event for event in run.events if isinstance(event.get("text"), str) or event["event"] == "start"]
    rows = [
        f"<tr><td>{time.strftime('%H:%M:%S', time.localtime(event['time']))}</td><td>{event['step']}</td>"
        f"<td>{escape(str(event.get('text', 'training begins')))}</td></tr>"
        for event in told
    ]
    saved = len(run.of("saved"))
    return (
        f"<section><h2>Events</h2><details><summary>{len(rows)} events, {saved} checkpoints</summary>"
        f"<table><tr><th>time</th><th>step</th><th></th></tr>{''.join(rows)}</table></details></section>"
        if rows
        else ""
    )


# ---- several runs ----------------------------------------------------------------------------------------------------


def _overview(runs: Sequence[Run]) -> str:
    cards = []
    for place, run in enumerate(runs):
        rows = {
            label: f"{value}, {words}" if "loss" in label else value for label, (value, words) in _figures(run).items()
        }
        cards.append(
            f'<article><h3><span class="{_key(place)}">{escape(run.name)}</span></h3>'
            f"{_list({'state': _state(run)[0], **rows})}</article>"
        )
    return f'<section class="columns">{"".join(cards)}</section>'


def _key(place: int) -> str:
    """The classes of a run's colour; of more runs than colours, the later ones are dashed."""
    return f"key c{place % COLOURS} line{' again' if place >= COLOURS else ''}"


def _compared_charts(runs: Sequence[Run]) -> list[charts.Chart | None]:
    def curves(kind: str, name: str, form: str = "line", share: float = 1.0) -> list[Curve]:
        return [
            Curve(run.name, run.points(kind, name, share), place % COLOURS, form, again=place >= COLOURS)
            for place, run in enumerate(runs)
        ]

    unit = "nats per supervised token"
    return [
        charts.chart("Validation loss", unit, curves("eval", "loss", "dotted"), from_zero=False),
        charts.chart("Training loss", unit, curves("train", "loss"), from_zero=False),
        charts.chart("Learning rate", "", curves("train", "learning_rate"), "power"),
        charts.chart("Gradient norm", "before clipping", curves("train", "gradient_norm")),
        charts.chart("Throughput", "tokens per second", curves("train", "tokens_per_second"), "si"),
        charts.chart("Memory", "GB, peak in MLX", curves("train", "peak_memory", share=1e-9)),
    ]


def _differences(runs: Sequence[Run]) -> str:
    """The options in which the runs differ."""
    options = [_options(run.config) for run in runs]
    rows = []
    for key in options[0]:
        values = [found.get(key, ("null", False))[0] for found in options]
        if len(set(values)) > 1 and key != "output_dir":
            cells = [f'<span class="{_key(place)}">{escape(value)}</span>' for place, value in enumerate(values)]
            rows.append(f"<div><dt>{escape(key)}</dt><dd>{''.join(cells)}</dd></div>")
    body = f'<dl class="list wide">{"".join(rows)}</dl>' if rows else "<p>None but the folder.</p>"
    return f"<section><h2>Settings that differ</h2>{body}</section>"


# ---- words -----------------------------------------------------------------------------------------------------------


def number(event: Event, name: str) -> float | None:
    """A finite figure of an event."""
    value = event.get(name)
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None
    )


def last_step(run: Run) -> int:
    return max((event["step"] for event in run.events), default=0)


def _list(rows: dict[str, str]) -> str:
    body = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return f'<dl class="list">{"".join(body)}</dl>'


def _short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path).parts[-2:])


def _text(text: str) -> str:
    """A text as it stands, with what has no glyph of its own, or turns the direction of others, made visible."""
    shown = (c if c in "\n\t" or not UNSHOWN.match(c) else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown)) or "<i>nothing</i>"
