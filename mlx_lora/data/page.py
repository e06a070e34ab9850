"""The data doctor's words as one page of HTML that needs nothing else."""

from html import escape

from mlx_lora.data.checks import Finding
from mlx_lora.data.sources import MAX_LISTED
from mlx_lora.data.summary import Lengths, Shown, Summary

STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #1d2320; --quiet: #66706b; --line: #dfe3e0;
  --edge: #b9c2bd; --bar: #5b8def; --learned: #d3efdc; --learned-text: #11552f; --learned-edge: #93cda9;
  --bad: #b3261e; --bad-back: #fbe9e7;
  --note: #8a5a00; --note-back: #fff4dd; }
@media (prefers-color-scheme: dark) { :root { --back: #15191a; --text: #e4e8e6; --quiet: #97a19c; --line: #313839;
  --edge: #4a5550; --bar: #6f9bf2; --learned: #1c4a30; --learned-text: #b5f0cb; --learned-edge: #397a55;
  --bad: #ffb4ab; --bad-back: #48201d;
  --note: #f3cd82; --note-back: #3d3119; } }
* { box-sizing: border-box; }
body { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.quiet { color: var(--quiet); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.2rem .35rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
th { color: var(--quiet); font-weight: 400; border-bottom: 1px solid var(--line); }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 3px .8rem; align-items: center;
  font-variant-numeric: tabular-nums; }
.bars > :nth-child(odd) { text-align: right; color: var(--quiet); }
.bar { display: flex; align-items: center; gap: .5rem; white-space: nowrap; }
.bar i { height: .9rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
.finding { border-left: 4px solid; padding: .5rem .8rem; margin: .6rem 0; border-radius: 3px; }
.bad { border-color: var(--bad); background: var(--bad-back); } .bad b { color: var(--bad); }
.note { border-color: var(--note); background: var(--note-back); } .note b { color: var(--note); }
.finding ul { margin: .3rem 0 0; padding-left: 1.1rem; font-size: .875rem; }
pre { margin: .3rem 0 1.4rem; padding: .8rem; border: 1px solid var(--line); border-radius: 4px;
  white-space: pre-wrap; font: .85rem/1.75 ui-monospace, Menlo, Consolas, monospace; }
pre span { border-radius: 3px; padding: .1rem 0; box-shadow: inset -1px 0 var(--edge); }
.learned { --edge: var(--learned-edge); }
.learned { background: var(--learned); color: var(--learned-text); } .end { color: var(--quiet); }
"""


def page(
    config: str,
    sides: list[Summary],
    histogram: Lengths | None,
    notes: list[str],
    rows: list[Shown],
    findings: list[Finding],
    verdict: str,
) -> str:
    parts = [f'<h1>What {escape(config)} trains on</h1><p class="quiet">{escape(verdict)}</p>']
    parts += [_finding(finding) for finding in findings]
    parts.append(f'<h2>Rows</h2><div class="scroll">{_table(sides)}</div>')
    if histogram is not None:
        most = max(count for _, count in histogram.bars)
        parts.append(f'<h2>Lengths</h2><p>{escape(histogram.words)}</p><div class="bars">')
        for words, count in histogram.bars:
            width = f'<i style="width: {80 * count / most:.1f}%"></i>' if count else ""
            parts.append(f'<span>{escape(words)}</span><span class="bar">{width}{count:,}</span>')
        parts.append("</div>")
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    if rows:
        key = '<span class="learned">learned</span>'
        parts.append(f'<h2>Rows of train, token by token</h2><p class="quiet">What is {key} counts in the loss.</p>')
    parts += [_row(row) for row in rows]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(config)}: rows</title>\n<style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n"
    )


def _table(sides: list[Summary]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *sides[0].counts))
    body = ""
    for side in sides:
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (side.name, *side.counts.values())) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _finding(finding: Finding) -> str:
    places = [escape(place) for place in finding.places[:MAX_LISTED]]
    if len(finding.places) > MAX_LISTED:
        places.append(f"... and {len(finding.places) - MAX_LISTED:,} more")
    listed = "".join(f"<li>{place}</li>" for place in places)
    kind, word = ("bad", "! ") if finding.spoils else ("note", "")
    return f'<div class="finding {kind}"><b>{word}{escape(finding.text)}</b><ul>{listed}</ul></div>'


def _row(row: Shown) -> str:
    more = f'\n<i class="end">... {row.between:,} tokens ...</i>\n' if row.between else ""
    return f'<div class="quiet">{escape(row.place)}</div><pre>{_tokens(row.first)}{more}{_tokens(row.last)}</pre>'


def _tokens(tokens: list[tuple[str, bool]]) -> str:
    found = ""
    for word, learned in tokens:
        shown = escape(word).replace("\n", '<i class="end">⏎</i>\n')
        found += f'<span class="learned">{shown}</span>' if learned else f"<span>{shown}</span>"
    return found
