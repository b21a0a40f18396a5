"""A view as one HTML file: templates filled, scripts and styles put in, nothing fetched by who opens it.

What datasets, jobs and errors say is text in the page and never markup: Jinja escapes it, the data of the
charts is JSON in which no `<` is left, and the page's own policy lets no script run but the four that are
hashed there.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from runner import __version__
from runner.planning.words import size
from runner.report import judge, marks
from runner.report.beside import Room
from runner.report.compare import Comparison
from runner.report.gallery import cut
from runner.report.loose import mapping
from runner.report.metrics import MEANING, named
from runner.report.read import Run
from runner.report.vendor import LIBRARIES
from runner.report.view import Page
from runner.supervisor.progress import moment

_TEMPLATES = files(__package__) / "templates"


def html(page: Page) -> str:
    """The report of one run."""
    return rendered("run.html", page.charts, page=page)


def comparison(found: Comparison) -> str:
    """Several runs side by side."""
    return rendered("compare.html", found.charts, found=found)


def rendered(template: str, charts: Mapping[str, Any], **values: Any) -> str:
    """A template, filled.

    Args:
        charts: what the charts are drawn from.
    """
    scripts = [*(library.script for library in LIBRARIES), *map(_text, ("charts.js", "page.js"))]
    return (
        _environment()
        .get_template(template)
        .render(
            version=__version__,
            style=Markup(_text("style.css")),
            charts=embedded(charts),
            scripts=[Markup(script) for script in scripts],
            hashes=Markup(" ".join(map(_hash, scripts))),
            **values,
        )
    )


def embedded(value: Any) -> Markup:
    """JSON that stands in a script element of a page: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bar": _bar,
        "became": lambda one: judge.WORDS[one],
        "breakable": _breakable,
        "clock": lambda at: moment(at) or "–",
        "count": lambda value: "–" if value is None else f"{value:,}",
        "cut": cut,
        "figure": lambda value: _minus(f"{value:.2f}"),
        "kind": lambda one: marks.WORDS[one],
        "meaning": MEANING.__getitem__,
        "named": named,
        "scalar": _scalar,
        "share": lambda value: f"{100 * min(1.0, max(0.0, value)):.2f}%",
        "signed": lambda value: _minus(f"{value:+.2f}"),
        "size": size,
        "way": _way,
        "what": _what,
    }
    return environment


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _breakable(key: str) -> Markup:
    """A dotted key that may be broken after its dots and lines."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", key))


def _minus(text: str) -> str:
    """With a minus sign for the hyphen."""
    return text.replace("-", "−")


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _what(run: Run) -> str:
    """`sft of demo:smolvlm-tiny, 4-bit, LoRA r=16, float32`."""
    job = run.resolved
    if not job:
        return "its job is not known"
    model, lora, packed = mapping(job.get("model")), job.get("lora"), mapping(job.get("quantization"))
    bits = "4-bit" if packed.get("load_in_4bit") else "8-bit" if packed else "not quantized"
    how = "full fine-tuning" if lora is None else f"LoRA r={mapping(lora).get('r', 8)}"
    return f"{job.get('method')} of {model.get('name_or_path')}, {bits}, {how}, {model.get('dtype')}"


def _way(page: Page, name: str) -> str:
    """`7.048 → 1.72` of a curve, its first and last value."""
    told = [value for point in page.run.history.points if (value := getattr(point, name)) is not None]
    if not told:
        return "not written down"
    return f"{told[0]:.4g} → {told[-1]:.4g}" if len(told) > 1 else f"{told[0]:.4g}"


def _bar(room: Room) -> Markup:
    """The interval of a plan and the peak that was measured, on one line."""
    assert room.peak is not None
    most = 1.08 * max(room.high, room.peak)
    low, width, at = (100 * value / most for value in (room.low, room.high - room.low, room.peak))
    return Markup(
        '<div class="track"><span class="span" style="left:{:.2f}%;width:{:.2f}%"></span>'
        '<span class="at {}" style="left:{:.2f}%"></span></div>'
        '<div class="scale"><span>0</span><span>planned, and the peak</span><span>{}</span></div>'
    ).format(low, width, room.where, at, size(most))
