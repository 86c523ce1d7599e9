"""One HTML page of a benchmark's results: plots, tables, and what they must be read with.

It needs nothing beside it: no script, no font, no file.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from stagemesh.bench.results import Results
from stagemesh.bench.tables import tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2e3440; margin: 2rem auto; max-width: 1300px;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
p.lead { color: #4c566a; margin-top: .2rem; }
p.warning { background: #fdf3e1; border-left: 4px solid #d08770; padding: .5rem .8rem; }
img { max-width: 100%; height: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e5e9f0;
         white-space: nowrap; }
th { color: #4c566a; font-weight: 600; }
tbody tr:hover { background: #f4f6fa; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; }
dt { color: #4c566a; } dd { margin: 0; overflow-wrap: anywhere; }
"""

_PLOTS = {
    "throughput.png": "Throughput against load",
    "latency.png": "Latency against load",
    "stages.png": "What the stages' time went to",
}


def page(results: Results, plots: Mapping[str, bytes]) -> str:
    facts = {
        "target": results.target,
        "model": results.model,
        "seed": results.seed,
        "temperature": results.temperature,
        **{key: value for key, value in results.machine.items() if value not in (None, "")},
    }
    objective = {key: value for key, value in results.objective.items() if value is not None}
    if objective:
        facts["objective"] = ", ".join(f"{key} ≤ {value:g}" for key, value in objective.items())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>stagemesh bench</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>stagemesh bench</h1>",
        f'<p class="lead">{escape(results.model)}, {escape(str(results.machine["started"]))}</p>',
        *(_warning(text) for text in _warnings(results)),
        *(_figure(name, data) for name, data in plots.items()),
        *(f"<h2>{title}</h2>\n{_table(text)}" for title, text in tables(results).items()),
        "<h2>Measured on</h2>",
        _facts(facts),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _warnings(results: Results) -> list[str]:
    found = list(results.notes)
    if results.interrupted:
        found.append("Interrupted: not all runs were made.")
    failed = sum(report.num_failed for report in results.reports)
    if failed:
        found.append(f"{failed} requests failed; latencies are of the others.")
    if any(report.client_cores > 0.8 for report in results.reports):
        found.append("The client used most of a core in some runs: it may have held them up.")
    return found


def _warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def _figure(name: str, data: bytes) -> str:
    title = _PLOTS.get(name, name)
    source = base64.b64encode(data).decode("ascii")
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{source}">'


def _table(markdown: str) -> str:
    heads, _, *rows = [_cells(line) for line in markdown.splitlines()]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{inner}</table></div>'


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _facts(facts: Mapping[str, object]) -> str:
    entries = (
        f"<dt>{escape(key)}</dt><dd>{escape(_value(value))}</dd>" for key, value in facts.items()
    )
    return f"<dl>{''.join(entries)}</dl>"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return str(value)
