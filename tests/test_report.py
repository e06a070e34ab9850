"""The report: what it holds is what the run measured, and it is one file that any browser shows, offline."""

import functools
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_lora import charts, config_file, finetune, metrics, page
from mlx_lora.errors import InputError

HOSTILE = '</script><script>alert("x")</script><img src="http://example.com/x.png" onerror="alert(1)"> & \x1b[31m'
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """The elements of a page; raises where they are not nested as HTML wants them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def numbers(self) -> list[list[dict]]:
        return next(json.loads(text) for tag, text in self.texts if tag == "script" and text.startswith("["))

    def paths(self) -> list[tuple[str, str]]:
        """(class, drawing) of each curve."""
        return [(made["class"], made["d"]) for tag, made in self.elements if tag == "path" and "class" in made]


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("report")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!" * (1 + n % 4)}) + "\n" for n in range(30))
    )
    return {
        "model": str(tiny_model),
        "data": {"train": str(rows), "valid": 0.3, "max_seq_length": 50},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"epochs": None, "max_steps": 12, "learning_rate": 0.02, "schedule": {"warmup": 2}},
        "eval": {"every": 4, "samples": [HOSTILE], "sample_tokens": 8},
        "log": {"every": 1},
        "output_dir": str(folder / "first"),
    }


@pytest.fixture(scope="module")
def run(options) -> Path:
    return finetune(options).output_dir


@pytest.fixture(scope="module")
def others(options, run) -> list[Path]:
    return [
        run,
        finetune(options, ["output_dir=" + str(run.parent / "second"), "lora.rank=4", "train.max_steps=7"]).output_dir,
    ]


def events(run: Path, kind: str) -> list[dict]:
    return [event for _, event in metrics.events(run / metrics.FILE) if event["event"] == kind]


def points(run: Path, kind: str, name: str) -> list[list[float]]:
    return [[event["step"], event[name]] for event in events(run, kind)]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_every_curve_has_the_numbers_of_the_run(run):
    loss, rate, norm, speed, memory = Page((run / page.FILE).read_text()).numbers()
    best = min(points(run, "eval", "loss"), key=lambda point: point[1])
    assert {curve["name"]: curve["points"] for curve in loss} == {
        "training": points(run, "train", "loss"),
        "validation": points(run, "eval", "loss"),
        "best, kept": [best],
    }
    assert rate[0]["points"] == points(run, "train", "learning_rate")
    assert norm[0]["points"] == points(run, "train", "gradient_norm")
    assert [curve["points"] for curve in speed] == [
        points(run, "train", "tokens_per_second"),
        points(run, "train", "supervised_tokens_per_second"),
    ]
    peak, between = (curve["points"] for curve in memory)
    assert [value for _, value in peak] == pytest.approx([event["peak_memory"] / 1e9 for event in events(run, "train")])
    assert len(between) == 12


def test_what_is_drawn_stands_where_the_axes_say(run):
    """Every point of the first chart, read off its path by the labels beside it."""
    text = (run / page.FILE).read_text()
    first = text[text.index("<figure>") : text.index("</figure>") + len("</figure>")]
    up = [(float(at), float(tick)) for at, tick in re.findall(r'class="y" style="top:([\d.]+)%">([\d.]+)<', first)]
    across = [(float(at), float(tick)) for at, tick in re.findall(r'class="x" style="left:([\d.]+)%">([\d.]+)<', first)]

    def read_off(places: list[tuple[float, float]], at: float) -> float:
        (one, its), (other, others) = places[0], places[-1]
        return its + (at - one) / (other - one) * (others - its)

    drawn = {name.split()[0]: d for name, d in Page(first).paths()}
    for name, kind in (("line", "train"), ("dots", "eval")):
        found = [
            (read_off(across, float(x) / charts.WIDTH * 100), read_off(up, float(y) / charts.HEIGHT * 100))
            for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn[name])
        ]
        expected = points(run, kind, "loss")
        assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=0.01)
        assert [y for _, y in found] == pytest.approx([y for _, y in expected], abs=2e-3)


def test_values_that_are_not_finite_leave_a_gap():
    drawn = charts.chart("x", "", [charts.Curve("a", [(0, 1.0), (1, 2.0), (2, None), (3, 1.0)], 0)])
    assert drawn is not None
    [(_, path)] = Page(charts.figure(drawn, 0)).paths()
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert charts.chart("x", "", [charts.Curve("a", [(0, None)], 0)]) is None


def test_a_long_curve_keeps_its_peaks_and_order():
    values = [float(step % 7) for step in range(100_000)]
    values[54_321], values[80_000] = 1e6, -1e6
    kept = charts.thinned(list(enumerate(values)))
    assert len(kept) <= charts.MOST_POINTS
    assert {(54_321, 1e6), (80_000, -1e6)} <= set(kept)
    assert kept == sorted(kept)
    assert all(values[step] == value for step, value in kept)


@pytest.mark.parametrize("low", [-3.7, 0.0, 0.001, 5.0708, 1e9])
@pytest.mark.parametrize("span", [0.0, 1e-6, 0.37, 9.99, 1e7])
def test_an_axis_holds_its_values_between_round_marks(low, span):
    axis = charts.linear(low, low + span)
    assert axis.low <= low + 1e-9 * abs(low)
    assert axis.high >= (low + span) * (1 - 1e-9 * (low + span > 0))
    assert 2 <= len(axis.ticks) <= 6
    gaps = {round(after - before, 12) for before, after in pairwise(axis.ticks)}
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)
    assert f"{max(gaps):e}"[0] in "1259"  # 9: 1 but for rounding
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == 1


@pytest.mark.parametrize(("low", "high"), [(1e-5, 3.0), (0.2, 1e12), (1.0, 1.0)])
def test_a_logarithmic_axis_has_powers_of_ten(low, high):
    axis = charts.logarithmic(low, high)
    assert axis.low <= low
    assert axis.high >= high
    assert 2 <= len(axis.ticks) <= 6
    assert axis.place((axis.low * axis.high) ** 0.5) == pytest.approx(0.5)


def test_a_mean_of_neighbours():
    values = [(step, float(step * step)) for step in range(9)]
    means = dict(charts.running_mean([*values, (9, None)], 5))
    assert means[4] == (4 + 9 + 16 + 25 + 36) / 5
    assert means[1] == (0 + 1 + 4) / 3
    assert means[8] == 64
    assert 9 not in means


# ---- words -----------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_loads_nothing(run):
    text = (run / page.FILE).read_text()
    parsed = Page(text)
    assert not [
        tag for tag, _ in parsed.elements if tag in ("img", "link", "iframe", "object", "embed", "video", "base")
    ]
    assert not [name for _, made in parsed.elements for name in made if name in ("src", "href", "onerror", "onclick")]
    assert not re.search(r"url\(|@import", Path(page.__file__).with_suffix(".css").read_text())
    assert len([tag for tag, _ in parsed.elements if tag == "script"]) == 2
    policy = next(made["content"] for _, made in parsed.elements if made.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_samples_stand_in_it_as_they_were_written(run):
    """A hostile prompt, and what base and adapter answered."""
    texts = ["".join(text for tag, text in Page((run / page.FILE).read_text()).texts if tag == "pre")]
    unseen = [c for c in HOSTILE if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert functools.reduce(lambda text, c: text.replace(c, f"\\x{ord(c):02x}"), unseen, HOSTILE) in texts[0]
    samples = events(run, "sample")
    assert [event["step"] for event in samples] == [0, 4, 8, 12]
    assert len({event["base"] for event in samples}) == 1


@pytest.mark.parametrize(
    "text", ["\U0001f469\u200d\U0001f467", "\u0645\u06cc\u200c\u062e", "5\u202f\u20ac", "\u3000\u5168"]
)
def test_what_languages_are_written_with_stands_as_it_is(text):
    assert page._text(text) == text


def test_what_would_turn_other_text_or_cannot_be_written_is_spelled_out():
    assert page._text("a\u202eb\x1b[2J\ud800") == "a\\u202eb\\x1b[2J\\ud800"


def test_it_tells_settings_data_and_events(run, options):
    text = " ".join(text for _, text in Page((run / page.FILE).read_text()).texts)
    for word in ("finished", "learning_rate", "0.02", "max_seq_length", "rows read", "padding efficiency", "nats"):
        assert word in text
    start = events(run, "start")[0]
    assert f"{start['data']['train']['tokens']:,}" in text
    assert sum(start["data"]["train"]["lengths"]["rows"]) == start["data"]["train"]["used"]


def test_what_is_not_the_default_is_set_off():
    loaded = config_file.parse(
        {"model": "m", "data": {"train": "d"}, "output_dir": "o"},
        ["train.optimizer.name=lion", "model.quantize={bits: 4}", "lora.rank=8"],
    )
    found = page._options(loaded)
    changed = {name for name, (_, is_changed) in found.items() if is_changed}
    assert changed == {
        "model.path", "data.train", "output_dir", "lora.rank", "model.quantize.bits", "model.quantize.group_size",
        "train.optimizer.name", "train.optimizer.weight_decay", "train.optimizer.betas",
    }  # fmt: skip
    assert "train.optimizer.eps" not in found


def test_several_runs_lie_over_one_another(others, run_command, tmp_path):
    out = tmp_path / "all.html"
    ended = run_command("report", *others, "--out", out)
    assert (ended.returncode, ended.stderr) == (0, "")
    parsed = Page(out.read_text())
    validation, training, *_ = parsed.numbers()
    for drawn, kind in ((validation, "eval"), (training, "train")):
        assert [curve["name"] for curve in drawn] == ["first", "second"]
        assert [curve["points"] for curve in drawn] == [points(run, kind, "loss") for run in others]
    text = " ".join(text for _, text in parsed.texts)
    differing = text[text.index("Settings that differ") :]
    assert "lora.rank" in differing
    assert "train.max_steps" in differing
    assert "data.train" not in differing


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_fails_no_run(options, tmp_path, capsys):
    (tmp_path / "run" / page.FILE).mkdir(parents=True)
    result = finetune(options | {"output_dir": str(tmp_path / "run"), "eval": {"every": 9}})
    assert result.steps == 12
    assert f"{page.FILE}: cannot be written" in capsys.readouterr().out


def test_a_run_that_is_stopped_has_its_report(options, tmp_path):
    failing = options | {"output_dir": str(tmp_path / "run"), "eval": {"every": 9}}
    failing["train"] = failing["train"] | {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 50}
    with pytest.raises(InputError):
        finetune(failing)
    text = (tmp_path / "run" / page.FILE).read_text()
    assert "of 50 steps" in text
    assert "not finite" in text


NO_TIME = '{"event": "note", "step": 1, "text": "x"}\n'
NO_STEP = json.dumps({"event": "train", "step": 10**400, "time": 1.0, "loss": 1.0}) + "\n"
NO_YEAR = json.dumps({"event": "train", "step": 1, "time": 10**30, "loss": 1.0}) + "\n"
NO_NUMBER = '{"event": "train", "step": 1, "time": []}\n'


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / metrics.FILE).unlink(), "holds no metrics.jsonl"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
        (lambda run: (run / page.FILE).write_text("<p>mine</p>"), "is no report of a run"),
        (lambda run: (run / metrics.FILE).write_text(NO_TIME), "as a run writes it"),
        (lambda run: (run / metrics.FILE).write_text(NO_NUMBER), "as a run writes it"),
        (lambda run: (run / metrics.FILE).write_text(NO_STEP), "as a run writes it"),
        (lambda run: (run / metrics.FILE).write_text(NO_YEAR), "as a run writes it"),
    ],
)
def test_what_is_no_run_is_one_clear_error(run, tmp_path, damage, words):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(InputError, match=words):
        page.write(tmp_path / "run" / page.FILE, [page.read(tmp_path / "run")])


def test_a_run_that_never_began_is_not_called_finished(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / metrics.FILE).write_text("")
    page.write(tmp_path / "run" / page.FILE, [page.read(tmp_path / "run")])
    text = (tmp_path / "run" / page.FILE).read_text()
    assert "not begun" in text
    assert "finished" not in text


def test_more_runs_than_colours_can_be_told_apart(run, tmp_path):
    folders = [shutil.copytree(run, tmp_path / f"run{number}") for number in range(page.COLOURS + 2)]
    page.write(tmp_path / "all.html", [page.read(folder) for folder in folders])
    parsed = Page((tmp_path / "all.html").read_text())
    keys = {made["class"] for _, made in parsed.elements if (made.get("class") or "").startswith("key c")}
    assert {"key c0 line", "key c0 line again", "key c1 line again"} <= keys
    assert "key c2 line again" not in keys


def test_the_command_says_so_and_exits_with_2(run_command, tmp_path):
    ended = run_command("report", tmp_path)
    assert (ended.returncode, ended.stderr) == (
        2,
        f"error: {tmp_path}: holds no metrics.jsonl; name the folder of a run\n",
    )


def test_a_run_that_has_just_begun_has_a_report(run, tmp_path):
    """With a last line that is not written yet."""
    shutil.copytree(run, tmp_path / "run")
    lines = (run / metrics.FILE).read_text().splitlines(keepends=True)
    (tmp_path / "run" / metrics.FILE).write_text(lines[0] + lines[-1][:20])
    assert "0 of 12 steps" in page.page([page.read(tmp_path / "run")])


# ---- a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    installed = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no browser is installed (apt install chromium, or playwright install chromium)")
        yield started
        started.close()


BOXES = """selector => [...document.querySelectorAll(selector)].map(each => {
  const box = each.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom] })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1440, 900), (390, 844)], ids=["laptop", "phone"])
def test_a_browser_shows_it(browser, run, others, tmp_path, size, scheme):
    """Offline, without a message or a request; nothing overlaps or is wider than the screen."""
    page.write(tmp_path / "all.html", [page.read(each) for each in others])
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True, has_touch=size[0] < 500
    )
    for path in (run / page.FILE, tmp_path / "all.html"):
        shown, told = context.new_page(), []
        for kind in ("console", "pageerror", "dialog", "requestfailed"):
            shown.on(kind, lambda what, told=told: told.append(what))
        shown.on("request", lambda request, told=told: told.append(request.url))
        shown.goto(path.as_uri())
        assert told == [path.as_uri()]
        assert shown.evaluate("document.documentElement.scrollWidth") == size[0]
        ink, paper = (
            sum(map(int, re.findall(r"\d+", shown.evaluate(f"getComputedStyle(document.body).{name}"))))
            for name in ("color", "backgroundColor")
        )
        assert (ink < 150 < 600 < paper) if scheme == "light" else (paper < 150 < 600 < ink)
        for number in range(shown.locator(".plot").count()):
            plot = f".plot[data-chart='{number}'] >"
            for labels in (f"{plot} .x", f"{plot} .y"):
                boxes = shown.evaluate(BOXES, labels)
                assert len(boxes) >= 2
                assert all(left >= 0 and right <= size[0] for left, _, right, _ in boxes)
                for one, other in pairwise(boxes):
                    assert one[2] < other[0] or other[3] < one[1] or one[3] < other[1]
        plot = shown.locator(".plot").first
        plot.hover()
        readout = shown.locator(".readout").inner_text()
        step = int(re.match(r"step (\d+)", readout)[1])
        kind, those = ("train", [run]) if path.name == page.FILE else ("eval", others)
        losses = [value for each in those for at, value in points(each, kind, "loss") if at == step]
        assert losses
        assert all(f"{loss:.3f}" in readout for loss in losses)
        shown.close()
    context.close()
