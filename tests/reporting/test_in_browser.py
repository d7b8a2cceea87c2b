"""The page in a real browser: nothing leaves it, nothing complains, every chart is drawn, a phone can read it."""

import json

import pytest

from gsem.reporting.report import report
from headless import CHROMIUM, Browser
from planted_run import planted_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (apt-get install chromium)")

# Of every chart: its title, and the size of its box and of what is drawn in it.
CHARTS = """[...document.querySelectorAll("svg[role=img]")].map((chart) => {
  const box = chart.getBoundingClientRect(), drawn = chart.getBBox();
  return [chart.querySelector("title").textContent, box.width, box.height, drawn.width, drawn.height];
})"""
WIDER = """[...document.querySelectorAll("body *")].filter((e) =>
  !e.closest(".scroll, thead") && e.getBoundingClientRect().right > innerWidth + 0.5
).map((e) => e.tagName + "." + e.className)"""
OVERLAPS = """[...document.querySelectorAll("svg[role=img]")].flatMap((chart) => {
  const level = [...chart.querySelectorAll("text:not([transform])")];
  const texts = level.map((t) => [t.textContent, t.getBoundingClientRect()]);
  const frame = chart.getBoundingClientRect();
  const outside = texts.filter(([, b]) =>
    b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1);
  const touching = texts.flatMap(([s, a], i) => texts.slice(i + 1).filter(([, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top + 3 < b.bottom - 3 && b.top + 3 < a.bottom - 3
  ).map(([t]) => s + " on " + t));
  const title = chart.querySelector("title").textContent;
  return [...outside.map(([s]) => s + " outside"), ...touching].map((s) => title + ": " + s);
})"""
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run, and two side by side."""
    folder = tmp_path_factory.mktemp("pages")
    first = planted_run(folder / "runs/planted", weights=True)
    second = planted_run(
        folder / "runs/a-run-with-a-name-that-is-longer-than-a-phone-is-wide", weights=True, audit=False
    )
    report(first, folder / "one.html", images=20)
    report([first, second], folder / "two.html", images=20)
    return {"one": folder / "one.html", "two": folder / "two.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_the_page_in_a_browser(browser, pages, name, width, dark):
    browser.open(pages[name], width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(WIDER) == []
    charts = browser.run(CHARTS)
    assert len(charts) == (11 if name == "one" else 16)
    assert [c for c in charts if min(c[1:]) < 20] == []
    assert browser.run(OVERLAPS) == []
    images = browser.run(
        "[...document.images].map((i) => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) == 30 * (1 if name == "one" else 2)
    assert all(complete and natural == 8 and shown > 40 for complete, natural, shown in images)
    assert browser.run(PAPER) == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    complaints = browser.events_of("Runtime.exceptionThrown") + browser.events_of("Log.entryAdded")
    assert complaints + browser.events_of("Runtime.consoleAPICalled") == []
    requested = {r["request"]["url"] for r in browser.events_of("Network.requestWillBeSent")}
    assert {url for url in requested if not url.startswith("data:")} == {pages[name].as_uri()}


def test_the_data_of_a_figure_can_be_copied(browser, pages):
    browser.open(pages["one"], width=1280)
    browser.run("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    browser.run('document.querySelector("#sweep-eps details").open = true')
    browser.run('document.querySelector("#sweep-eps .copy").click()')
    lines = browser.run("window.copied").splitlines()
    assert lines[0] == "run,eps,accuracy,low,high"
    assert lines[4] == "planted,0.3,0.125,0.105,0.145"
    assert len(lines) == 6
    assert browser.run('document.querySelector("#sweep-eps .copy").textContent') == "Copied"


def test_a_request_would_be_refused(browser, pages):
    # (That none was sent might be luck: the page forbids them.)
    browser.open(pages["one"], width=390)
    answer = browser.run('fetch("https://example.org").then(() => "sent", () => "refused")')
    assert answer == "refused"
    assert "Content Security Policy" in json.dumps(
        browser.events_of("Log.entryAdded") + browser.events_of("Runtime.consoleAPICalled")
    )


def test_it_prints(browser, pages, tmp_path):
    browser.open(pages["one"], width=1280, dark=True)
    browser("Emulation.setEmulatedMedia", media="print")
    assert browser.run(PAPER) == "rgb(255, 255, 255)"
    assert browser.run('getComputedStyle(document.querySelector("#sweep-eps .data")).display') == "none"
    browser("Emulation.setEmulatedMedia", media="")
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
