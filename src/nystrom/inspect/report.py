"""A report's numbers as one HTML page that needs nothing else: style, script and data are inside, and no address.

The answer and the tables are plain HTML, for a reader without scripts; page/*.js draws charts and maps from the data.
"""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template

from nystrom.inspect.advice import RECOMMENDED, cosine, percent, times
from nystrom.inspect.measure import Numbers
from nystrom.inspect.settings import EXACT

SCRIPTS = ("chart.js", "maps.js", "layers.js", "page.js")
Cell = tuple[str, str]
"""What a table cell shows, and its CSS classes."""


def html(report: Numbers) -> str:
    """The page."""
    style, script = _source("style.css"), "\n".join(map(_source, SCRIPTS))
    # Only this very script and style may run: whatever a text or a token holds, it stays text.
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    parts = {
        "title": escape(f"Attention of {report['model']['name']}"),
        "model": escape(report["model"]["name"]),
        "about": escape(about(report)),
        "headline": escape(report["answer"]["headline"]),
        "sentences": "".join(f"<p>{escape(words)}</p>" for words in report["answer"]["sentences"]),
        "figures": figures(report),
        "code": escape(report["answer"]["code"]),
        "offer": escape(offer(report)),
        "options": options(report),
        "layers": layers(report),
        "lengths": lengths(report),
        "environment": escape(environment(report)),
        "target": f"{report['target_error']:g}",
        "seen": escape(f"{report['texts']['count']} texts of {report['texts']['length']} tokens"),
    }
    inside = {"policy": policy, "style": style, "script": script, "data": data(report)}
    return Template(_source("template.html")).substitute(parts | inside)


def data(report: Numbers) -> str:
    """JSON in which nothing can end its script element."""
    return json.dumps(report, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def about(report: Numbers) -> str:
    """What was measured, on what, when."""
    model, texts = report["model"], report["texts"]
    return (
        f"{model['architecture']}, {model['layers']} layers of {model['heads']} heads of {model['head_dim']} · "
        f"{texts['count']} texts of {texts['length']} tokens from {texts['path']} · {report['utc'][:10]}"
    )


def environment(report: Numbers) -> str:
    """The machine and the versions."""
    at = report["environment"]
    versions = [f"nystrom {at['nystrom']}", *([f"commit {at['commit']}"] if at["commit"] else [])]
    versions += [f"{name} {at['packages'][name]}" for name in ("torch", "transformers")]
    threads = f"{at['threads']} thread{'s' * (at['threads'] > 1)}"
    return f"{at['processor']}, {threads}; {', '.join(versions)}; Python {at['python']}; {report['utc']}"


def label(choice: str, report: Numbers) -> str:
    """A reader's name for an id."""
    words = {EXACT: "Exact", RECOMMENDED: "Recommended, layer by layer"}
    return words.get(choice) or report["settings"][choice]["label"]


def offer(report: Numbers) -> str:
    """What the answer's numbers and its code are of."""
    option = report["answer"]["option"]
    return "With the recommended settings" if option == RECOMMENDED else f"With the closest: {label(option, report)}"


def figures(report: Numbers) -> str:
    """The answer's numbers, large."""
    found = report["options"][report["answer"]["option"]]
    longest = f"at {report['speed']['lengths'][-1]:,} tokens"
    if not (report["speed"]["measured"][EXACT][-1] and found["measured"][-1]):
        longest += ", extrapolated"
    shown = [
        (cosine(found["cosine_mean"]), "Embedding cosine", f"least {cosine(found['cosine_min'])}"),
        (percent(found["hidden_error"]), "Hidden-state error", "last layer, relative"),
        (times(found["attention_speed_up"][-1]), "Attention speed-up", longest),
        (times(found["model_speed_up"][-1]), "Encoder speed-up", longest),
    ]
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(number)}</b><span>{escape(note)}</span></dd></div>"
        for number, name, note in shown
    )


def options(report: Numbers) -> str:
    """Each setting in every layer, and the recommendation."""
    longest = f"{report['speed']['lengths'][-1]:,}"
    headings = ["Setting", "Layer error, mean", "Layer error, most", "Hidden-state error", "Cosine, mean"]
    headings += ["Cosine, least", f"Attention at {longest}", f"Encoder at {longest}"]
    rows = []
    for name, found in report["options"].items():
        met = "met" if found["error_most"] <= report["target_error"] else ""
        kind = "recommended" if name == RECOMMENDED else report["settings"][name]["method"]
        rows.append(
            [
                (label(name, report), f"key {kind}"),
                (f"{found['error_mean']:.3f}", ""),
                (f"{found['error_most']:.3f}", met),
                (f"{found['hidden_error']:.3f}", ""),
                (cosine(found["cosine_mean"]), ""),
                (cosine(found["cosine_min"]), ""),
                (times(found["attention_speed_up"][-1]), ""),
                (times(found["model_speed_up"][-1]), ""),
            ]
        )
    return table("Every setting in all layers at once", headings, rows)


def layers(report: Numbers) -> str:
    """A row per layer."""
    headings = ["Layer", "Rank for 90\u00a0%", "Rank for 99\u00a0%", "Weight on itself", "Recommended", "Its error"]
    headings += ["Least error of any"]
    rows = []
    for layer in report["layers"]:
        choice = layer["recommended"]
        error = 0.0 if choice == EXACT else layer["error"][choice]
        kind = EXACT if choice == EXACT else report["settings"][choice]["method"]
        rows.append(
            [
                (str(layer["index"]), ""),
                (str(layer["rank90"]), ""),
                (str(layer["rank99"]), ""),
                (f"{layer['diagonal']:.3f}", ""),
                (label(choice, report), f"key wide {kind}"),
                (f"{error:.3f}", ""),
                (f"{layer['error'][layer['closest']]:.3f}", ""),
            ]
        )
    return table("What each layer's attention is like, and what it can run", headings, rows)


def lengths(report: Numbers) -> str:
    """A row per length."""
    speed, option = report["speed"], report["answer"]["option"]
    found = report["options"][option]
    headings = ["Tokens", "Exact, ms", f"{label(option, report).split(',')[0]}, ms", "Attention", "Encoder"]
    layers = report["model"]["layers"]
    rows = []
    for place, n in enumerate(speed["lengths"]):
        exact, ours = layers * speed["ms"][EXACT][place], found["attention_ms"][place]
        cells = [f"{n:,}", milliseconds(exact, speed["measured"][EXACT][place])]
        cells += [milliseconds(ours, found["measured"][place])]
        cells += [times(found["attention_speed_up"][place]), times(found["model_speed_up"][place])]
        rows.append([(cell, "") for cell in cells])
    return table("Attention of all layers, one text, and how many times faster than exact", headings, rows)


def milliseconds(ms: float, measured: bool) -> str:
    """Three digits, or all before the point."""
    return (f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}") + ("" if measured else " (extrapolated)")


def table(caption: str, headings: list[str], rows: list[list[Cell]]) -> str:
    """A table, whose cells know their heading: on a narrow screen every row is a card."""
    wide = [classes for _, classes in rows[0]]
    head = "".join(
        f'<th scope="col" class="{"wide" if "wide" in classes else ""}">{escape(heading)}</th>'
        for heading, classes in zip(headings, wide, strict=True)
    )
    body = ""
    for (first, classes), *rest in rows:
        cells = f'<th scope="row" class="{classes}">{escape(first)}</th>'
        for heading, (text, names) in zip(headings[1:], rest, strict=True):
            cells += f'<td class="{names}" data-heading="{escape(heading)}">{escape(text)}</td>'
        body += f"<tr>{cells}</tr>\n"
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _source(name: str) -> str:
    return files("nystrom.inspect").joinpath("page", name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
