"""Reports of real runs in a real headless browser: what a person sees and does there; nothing is fetched.

The sft run was preempted twice and ran out of memory once (tests/reported.py). Screenshots stay in
tests/output/.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

from runner import cli
from tests import browser, reported

FOUND = browser.executable()
pytestmark = pytest.mark.skipif(
    FOUND is None, reason="no browser: none is installed, and npm could not bring one (make .venv/browser)"
)

SCREENSHOTS = Path(__file__).with_name("output")

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"

PREEMPTIONS, SHRINKS = 2, 1


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; some of its rows are made right, so that there is something to filter."""
    run = reported.sft(tmp_path_factory.mktemp("sft"))
    for label, right in (("before", (1, 2)), ("after", (0, 1, 3))):
        file = run / "evaluation" / f"{label}.predictions.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for number in right:
            records[number] |= {"relaxed_accuracy": True, "prediction": records[number]["answers"][0]}
        records[5] |= {"question": EVIL, "prediction": EVIL, "row": EVIL, "group": EVIL}
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported.dpo(tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    assert FOUND is not None
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(FOUND.executable), env=FOUND.environment, args=list(browser.FLAGS)
        )
        yield started
        started.close()


class Tab:
    """A page, and all that it asked for and complained of."""

    def __init__(self, chromium: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        viewport = {"width": width, "height": 900}
        self.context = chromium.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("figure svg")

    def js(self, script: str) -> Any:
        return self.page.evaluate(script)

    def close(self) -> None:
        """Nothing was fetched, nothing complained."""
        self.context.close()
        assert self.complaints == []
        outside = [url for url in self.asked if not url.startswith(("file://", "data:"))]
        assert outside == [] and len([url for url in self.asked if url.startswith("file://")]) == 1


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    tabs: list[Tab] = []

    def opened(*arguments: Any, **options: Any) -> Tab:
        tabs.append(Tab(chromium, *arguments, **options))
        return tabs[-1]

    yield opened
    for one in tabs:
        one.close()


def made(run: Path) -> Path:
    """The report of a run, by the public verb; made once."""
    file = run.parent / f"{run.name}.html"
    if not file.exists():
        assert cli.main(["report", str(run), "--to", str(file)]) == 0
    return file


def shown(tab: Tab) -> list[str]:
    """What became of the rows that are shown."""
    rows = "[...document.querySelectorAll('table.predictions tbody tr')].filter(row => row.checkVisibility())"
    return list(tab.js(f"{rows}.map(row => row.dataset.became)"))


def keep(tab: Tab, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    tab.page.screenshot(path=str(SCREENSHOTS / f"{name}.png"), full_page=True)


CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, style, noscript")) continue;
    const style = getComputedStyle(element);
    const front = light(parse(element.closest("svg") ? style.fill : style.color));
    const [a, b] = [front, light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return found;
}
"""
"""Contrast of every visible text with what is behind it (WCAG 2, 1.4.3)."""


@pytest.mark.parametrize(
    ("kind", "width", "scheme"),
    [
        ("sft", 1280, "light"),
        ("sft", 1280, "dark"),
        ("sft", 390, "light"),
        ("sft", 390, "dark"),
        ("dpo", 1280, "dark"),
        ("dpo", 390, "light"),
    ],
)
def test_it_can_be_read_at_any_width_in_either_theme(
    request: pytest.FixtureRequest, tab: Any, kind: str, width: int, scheme: str
) -> None:
    page = tab(made(request.getfixturevalue(kind)), width=width, scheme=scheme)
    keep(page, f"{kind}-{width}-{scheme}")
    assert page.js("document.documentElement.scrollWidth") == width
    found = page.js(CONTRAST)
    assert len(found) > 120
    assert [one for one in found if one[0] < 4.5] == []
    images = page.js(
        "[...document.querySelectorAll('table.predictions img')].map(i => [i.naturalWidth, i.alt])"
    )
    assert len(images) >= 12 and all(wide > 0 and alt for wide, alt in images)
    headings = page.js("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))


def test_everything_that_happened_is_marked_on_the_curves(tab: Any, sft: Path) -> None:
    page = tab(made(sft))
    result = json.loads((sft / "result.json").read_text())
    assert [one["per_device"] for one in result["restarts"]] == [None, None, {"from": 8, "to": 4}]
    for chart in ("loss", "evaluated", "grad_norm", "learning_rate"):
        lines = page.js(
            f"[...document.querySelectorAll('[data-chart={chart}] svg [aria-label^=\"mark \"]')]"
            ".map(g => g.getAttribute('aria-label'))"
        )
        assert lines.count("mark preemption") == PREEMPTIONS and lines.count("mark batch") == SHRINKS, lines
        assert [line for line in lines if "label" in line] == [f"mark label {n}" for n in (1, 2, 3)]
    at = page.js(
        "[...document.querySelectorAll('[data-chart=loss] svg [aria-label^=\"mark \"]:is(line)')]"
        ".map(line => line.getBoundingClientRect().x)"
    )
    assert at == sorted(at) and len(set(at)) == 3
    listed = page.js("[...document.querySelectorAll('ol.marks li')].map(one => one.innerText)")
    for line, restart in zip(listed, result["restarts"], strict=True):
        assert f"at step {restart['step']}" in line
    assert "8 → 4 rows a device" in listed[2]
    held_out = page.js("document.querySelectorAll('[data-chart=loss] svg [aria-label=dot] circle').length")
    assert held_out == 3, "the loss of held-out rows at steps 4, 8 and 10"
    names = page.js("[...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label'))")
    assert len(names) == 4 and all("3 marks" in name for name in names)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_filter_and_the_search_by_keyboard(tab: Any, sft: Path, width: int) -> None:
    page = tab(made(sft), width=width)
    keys = page.page.keyboard
    assert len(shown(page)) == 10, "the first ten of 24"
    page.page.focus("input[name=became]")
    for became, count in (("broken", 1), ("wrong", 20), ("fixed", 2), ("right", 1)):
        keys.press("ArrowRight")
        assert shown(page) == [became] * min(count, 10)
        assert page.page.inner_text(".status") == f"{count} of 24 rows"
    keys.press("Home")
    keys.press("Tab")
    assert page.js("document.activeElement.id") == "search"
    keys.type("no such words")
    assert shown(page) == [] and page.page.inner_text(".status") == "0 of 24 rows"
    page.page.fill("#search", "")
    page.page.focus("input[name=became]:checked")
    for _ in range(4):
        keys.press("ArrowLeft")
    assert len(shown(page)) == 10
    page.page.focus("#more")
    keys.press("Enter")
    assert len(shown(page)) == 20


def test_the_loss_on_a_logarithmic_scale(tab: Any, sft: Path) -> None:
    page = tab(made(sft))
    last = "document.querySelector('[data-chart=loss] svg [aria-label=line] path').getAttribute('d')"
    linear = page.js(last)
    page.page.focus("button.log")
    page.page.keyboard.press("Space")
    assert page.js("document.querySelector('button.log').getAttribute('aria-pressed')") == "true"
    assert page.js(last) != linear
    page.page.keyboard.press("Space")
    assert page.js(last) == linear


def test_an_image_opens_and_closes_by_keyboard(tab: Any, sft: Path) -> None:
    page = tab(made(sft))
    page.page.focus("button.thumb")
    page.page.keyboard.press("Enter")
    assert page.js("document.querySelector('dialog').open")
    assert page.js("document.querySelector('dialog img').naturalWidth") > 0
    page.page.keyboard.press("Escape")
    assert not page.js("document.querySelector('dialog').open")
    assert page.js("document.activeElement.className") == "thumb"


def test_the_switch_overrides_the_theme_of_the_system(tab: Any, sft: Path) -> None:
    page = tab(made(sft), scheme="light")
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    light = page.js(colours)
    page.page.focus("#theme")
    page.page.keyboard.press("Enter")
    dark = page.js(colours)
    assert dark[0] != light[0] and dark[1] != light[1]
    assert page.page.inner_text("#theme") == "Light theme"
    page.page.keyboard.press("Enter")
    assert page.js(colours) == light
    assert tab(made(sft), scheme="dark").js(colours) == dark


def test_where_the_keyboard_is_can_be_seen(tab: Any, sft: Path) -> None:
    page = tab(made(sft))
    page.page.keyboard.press("Tab")
    assert page.page.inner_text(":focus") == "Skip to the content"
    for _ in range(4):
        page.page.keyboard.press("Tab")
        width = page.js("getComputedStyle(document.activeElement).outlineWidth")
        assert width == "3px", page.js("document.activeElement.outerHTML")


def test_nothing_that_others_wrote_is_markup(tab: Any, sft: Path, tmp_path: Path) -> None:
    """A question, a prediction, a row's name, a reason, an error, a value of the job and a version."""
    run = tmp_path / "evil"
    shutil.copytree(sft, run, symlinks=True)
    result = json.loads((run / "result.json").read_text())
    result |= {"outcome": "failed", "error": f"{EVIL}; remedy: {EVIL}", "versions": {EVIL: EVIL}}
    (run / "result.json").write_text(json.dumps(result))
    said = (run / "events.jsonl").read_text().splitlines()
    evil = json.dumps(EVIL)
    said.insert(-1, f'{{"event": "restart", "attempt": 9, "reason": {evil}, "after": {evil}, "step": 3}}')
    said.insert(-1, f'{{"event": "warning", "attempt": 9, "message": {evil}}}')
    said[-1] = json.dumps({"event": "end", "outcome": "failed", "exit_code": 1, "error": result["error"]})
    (run / "events.jsonl").write_text("\n".join(said))
    job = (run / "job.yaml").read_text()
    (run / "job.yaml").write_text(re.sub(r"^name: \S+", f"name: {evil}", job, flags=re.MULTILINE))
    page = tab(made(run))
    page.page.wait_for_timeout(100)
    assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('img[src=x], body script').length") == 5  # its own: data, four
    assert page.page.inner_text("h1") == EVIL
    assert page.page.inner_text(".error").count(EVIL) == 2
    assert page.js("document.body.innerText").count(EVIL) >= 8


def test_the_policy_of_the_page_stops_a_script_that_got_in(chromium: Any, sft: Path, tmp_path: Path) -> None:
    """Were something not escaped after all."""
    file = tmp_path / "report.html"
    file.write_text(made(sft).read_text().replace("</h1>", "<script>window.hacked = 1</script></h1>", 1))
    one = Tab(chromium, file)
    assert one.js("window.hacked") is None
    one.context.close()
    assert any("Content Security Policy" in complaint for complaint in one.complaints)


def test_the_numbers_are_there_without_javascript(chromium: Any, dpo: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(made(dpo).as_uri())
    text = page.inner_text("main")
    result = json.loads((dpo / "result.json").read_text())
    for when in ("before", "after"):
        found = result["metrics"][when]["preference_accuracy"]
        assert f"{found['overall']:.2f}\u00a0[{found['low']:.2f}, {found['high']:.2f}]" in text.replace(
            f"{found['overall']:.2f} [", f"{found['overall']:.2f}\u00a0["
        )
    assert "Chosen" in text and "Rejected" in text and "margin" in text
    assert page.locator("table.predictions tbody tr").count() == 12
    context.close()


def test_runs_side_by_side(
    tab: Any, sft: Path, dpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "both.html"
    assert cli.main(["report", str(sft), str(dpo), "--to", str(file)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^training\.max_steps +10 +4$", said, re.MULTILINE)
    assert re.search(r"^method +sft +dpo$", said, re.MULTILINE)
    assert re.search(r"^restarts +3 +0$", said, re.MULTILINE)
    assert "quantization.load_in_4bit" not in said
    for width in (1280, 390):
        page = tab(file, width=width)
        keep(page, f"both-{width}")
        assert page.js("document.documentElement.scrollWidth") == width
        strokes = page.js(
            "[...document.querySelectorAll('[data-chart=loss] svg [aria-label=line]')]"
            ".map(one => one.getAttribute('stroke'))"
        )
        assert strokes == ["var(--run-1)", "var(--run-2)"]
        assert [one for one in page.js(CONTRAST) if one[0] < 4.5] == []
