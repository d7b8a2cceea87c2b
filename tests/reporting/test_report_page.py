"""The page, the Markdown and the card of a planted run: every figure is there, and names are never markup."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gsem import __version__
from gsem._text import between
from gsem.auditing import Audit
from gsem.reporting import cards, html, markdown, read_runs
from gsem.reporting.read import bare
from gsem.reporting.svg import Bar, bars, doubling, linear, nice, tag
from gsem.reporting.views import accuracies, percent, verdict
from planted_run import ATTACKED, CLASSES, planted_audit, planted_run

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = '<script>alert("1")</script>&|`*'


class Strict(HTMLParser):
    """Collects text and attributes; every element must be closed by its own end."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.attributes, self.ids = [], [], [], []

    def handle_starttag(self, name, attributes):
        self.text.append(" ")
        if name not in VOID:
            self.open.append(name)
        self.attributes += [(name, *pair) for pair in attributes]
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"</{name}> at {self.getpos()}"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parsed(page: str) -> Strict:
    found = Strict()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


def text_of(page: str) -> str:
    return " ".join("".join(parsed(page).text).split())


@pytest.fixture
def entry(tmp_path):
    return read_runs([planted_run(tmp_path / "planted")])[0]


def test_it_holds_every_figure_of_the_evaluation(entry):
    def interval(found):
        found = found if isinstance(found, dict) else found._asdict()
        return between(found["low"], found["high"])

    text = text_of(html([entry]))
    summary = entry.result.to_dict()
    for row in [r for r in summary["attacks"] if r["bounded"]]:
        assert f"{percent(row['mean'])} {interval(row)}" in text
        for key in ("vote", "persistent10"):
            if row["noise"] == "fresh":
                assert f"{percent(row[key]['mean'])} {interval(row[key])}" in text
    for name in ("worst", "worst@frozen", "worst@off"):
        one = summary["worst"][name]["expected"]
        assert f"{percent(one['mean'])} {interval(one)}" in text
    assert "worst case 45.0%" in text  # the mean of 0, 10, … 90
    assert "100.0% at a median L2 distance of 0.75" in text
    published = entry.result.as_published(ATTACKED)
    assert f"{ATTACKED}: {percent(published.mean)} {interval(published)}" in text
    assert "40 test images (the first ones), eps = 0.15 (Linf), 100 scoring draws" in text
    assert "2050 passes/image, 1:01 min" in text


def test_the_verdict_comes_first_and_every_check_is_there(entry):
    text = text_of(html([entry]))
    assert text.index("OVERSTATED") < text.index("Accuracies")
    assert text.index("slope 1.36") < text.index("worst case 45.0%")
    for check in entry.audit.checks:
        assert f"gsem audit runs/planted --quick --only {check.name}" in text
        assert check.title in text
        assert f"flagged when {check.threshold}" in text
        assert check.outcome_in_words in text
        assert check.advice in text
        assert check.reference in text
    assert "figure 1.358" in text
    assert [view.check.outcome for view in verdict(entry).checks] == [
        "flag", "inconclusive", "pass", "pass", "not applicable"
    ]  # fmt: skip


def test_what_was_trained(entry):
    text = text_of(html([entry]))
    for line in ("recipe gcat", "data digits", "seed 7", "commit 0123456789ab", "machine x86_64 cpu", "torch 2.13.0"):
        assert line in text
    assert "5 attack, 1 training" in text
    assert "training time 40 s" in text
    assert "audit 2:05 min" in text


def test_every_chart_is_well_formed_and_has_a_text_alternative(entry):
    page = html([entry])
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    shown = [ElementTree.fromstring(unescape_entities(c)) for c in charts]
    drawn = [c for c in shown if c.get("role") == "img"]
    titles = {c.find("title").text for c in drawn}
    assert titles == {
        "Expected accuracy under each attack",
        "Accuracy against eps",
        "Accuracy against attack steps",
        "Accuracy against draws",
        "Validation accuracy while training",
        "Training loss",
        "Accuracy of each class",
    }
    assert all(c.find("desc").text for c in drawn)
    found = parsed(page)
    labelled = [value for _, key, value in found.attributes if key == "aria-labelledby"]
    assert all(set(value.split()) <= set(found.ids) for value in labelled)
    assert len(found.ids) == len(set(found.ids))
    assert page.count("Copy as CSV") == len(drawn)


def unescape_entities(text: str) -> str:
    return text.replace("&#34;", '"').replace("&#39;", "'")


def test_curves_and_their_data(entry):
    text = text_of(html([entry]))
    assert "planted: 95.0% at 0, 71.0% at 0.075, 43.0% at 0.15, 12.5% at 0.3, 3.0% at 1." in text
    assert "planted 0.3 0.125 0.105 0.145" in text
    assert "chance 10.0%" in text
    assert "last epoch: robust 60.0%, clean 80.0%" in text


def test_nothing_is_loaded_from_anywhere(entry):
    page = html([entry])
    loaded = [
        value for _, key, value in parsed(page).attributes if key in ("src", "href", "srcset", "xlink:href", "action")
    ]
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    assert "default-src 'none'" in page


def test_names_are_text(tmp_path):
    run = planted_run(tmp_path / HOSTILE.replace("/", "-"), classes=(HOSTILE, *CLASSES[1:]))
    metadata = planted_audit().metadata | {"command": f"gsem audit {HOSTILE}", "attacks": [HOSTILE]}
    planted_audit(reason=HOSTILE, metadata=metadata).save(run / "audit.json")
    entries = read_runs([run])
    page = html(entries)
    assert page.count("<script") == 1  # the page's own
    assert HOSTILE in "".join(parsed(page).text)
    text = markdown(entries)
    assert "<script" not in re.sub(r"`[^`]*`", "", text.replace("\\`", ""))  # (in code it is text)
    assert unescape(text).count("alert") > 2


def test_paths_of_the_machine_stay_there(tmp_path):
    run = planted_run(tmp_path / "planted")
    metadata = planted_audit().metadata | {"command": f"gsem audit {run} --data {tmp_path}/photos --quick"}
    planted_audit(metadata=metadata).save(run / "audit.json")
    saved = json.loads((run / "recipe.json").read_text())
    saved["recipe"] |= {"data": f"{tmp_path}/photos", "data_path": str(tmp_path)}
    (run / "recipe.json").write_text(json.dumps(saved))
    entries = read_runs([run])
    for text in (html(entries), markdown(entries), cards(entries)):
        assert str(tmp_path) not in text
    assert "gsem audit planted --data photos --quick --only gradient" in text_of(html(entries))
    assert bare("runs/x") == "runs/x"


def test_without_audit_and_evaluation_it_names_the_commands(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "bare", audit=False)
    for file in run.glob("evaluation.*"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    page = text_of(html(read_runs(["bare"])))
    assert "NOT AUDITED" in page
    assert "gsem audit bare" in page
    assert "gsem audit bare --only sweeps" in page
    assert "gsem evaluate bare --suite standard" in page
    (run / "metrics.jsonl").unlink()
    assert "There are no training metrics" in text_of(html(read_runs(["bare"])))
    assert "NOT AUDITED" in markdown(read_runs(["bare"]))
    card = json.loads(cards(read_runs(["bare"])))
    assert card["clean_acc"] is None
    assert card["unreliable"] is None


def test_a_curve_is_drawn_for_the_data_that_are_there(tmp_path):
    run = planted_run(tmp_path / "some")
    audit = planted_audit().to_dict()
    audit["checks"][4]["details"] = {"eps": [{"eps": 0.1, "accuracy": 0.5}, "?", {"eps": None}], "steps": {}, "eot": []}
    (run / "audit.json").write_text(json.dumps(audit))
    text = text_of(html(read_runs([run])))
    assert "Accuracy against eps" in text
    assert "50.0% at 0.1" in text
    assert "Accuracy against attack steps" not in text


def test_runs_stand_side_by_side(tmp_path):
    first, second = planted_run(tmp_path / "a/run"), planted_run(tmp_path / "b/run", audit=False)
    entries = read_runs([first, second])
    assert [e.name for e in entries] == ["a/run", "b/run"]
    page = html(entries)
    text = text_of(page)
    assert "a/run, b/run" in text
    assert "OVERSTATED" in text
    assert "NOT AUDITED" in text
    assert "gradient flag, answered (1.358) –" in text
    assert len(parsed(page).ids) == len(set(parsed(page).ids))
    assert 'class="run s1"' in page
    assert [c["name"] for c in json.loads(cards(entries))] == ["a/run", "b/run"]


def test_markdown(entry):
    text = markdown([entry])
    worst = entry.result.summary("worst")["expected"]
    assert f"| worst case | 45.0% ({between(worst['low'], worst['high'])}) |" in text
    assert text.index("**OVERSTATED.**") < text.index("## Accuracies")
    assert "`gsem audit runs/planted --quick --only binarization`" in text
    assert "| planted | 0.3 | 0.125 | 0.105 | 0.145 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert sum(t.count("\n") for t in tables) == len(rows)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_wording(entry):
    """The sentences of a report, in one place; intervals are bootstrapped and left out."""
    text = re.sub(r"\(\d+\.\d – \d+\.\d\)", "(low – high)", markdown([entry])).replace(__version__, "VERSION")
    card = json.loads(cards([entry]))
    assert f"{text}\nfootnote: {card['footnote']}\n" == (Path(__file__).parent / "wording.md").read_text()


def test_the_card_has_robustbench_field_names(entry):
    card = json.loads(cards([entry]))
    ours = card.pop("gsem")
    assert list(card) == [
        "link",
        "name",
        "authors",
        "additional_data",
        "number_forward_passes",
        "dataset",
        "venue",
        "architecture",
        "eps",
        "clean_acc",
        "reported",
        "autoattack_acc",
        "footnote",
        "unreliable",
    ]
    assert card["clean_acc"] == "95.00"
    assert card["reported"] == "45.00"
    assert card["autoattack_acc"] is None  # it was not run
    assert card["unreliable"] is True
    assert (card["dataset"], card["architecture"], card["eps"]) == ("digits", "gsem-resnet10x16", "0.15")
    assert ours["verdict"] == "OVERSTATED"
    assert ours["worst"]["worst"]["expected"]["mean"] == pytest.approx(0.45)


def test_an_audit_of_all_checks_goes_before_a_later_one_of_some(tmp_path):
    run = planted_run(tmp_path / "run")
    planted_audit(verdict="SUSPECT", metadata={"only": ["gradient"]}).save(run / "audit-2.json")
    assert read_runs([run])[0].audit.verdict == "OVERSTATED"
    planted_audit(verdict="TRUSTED").save(run / "audit-10.json")
    assert read_runs([run])[0].audit.verdict == "TRUSTED"
    assert isinstance(read_runs([run])[0].audit, Audit)


def test_the_latest_evaluation_is_shown_and_others_are_named(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "run")
    (run / "evaluation-2.npz").write_bytes((run / "evaluation.npz").read_bytes())
    monkeypatch.chdir(tmp_path)
    entry = read_runs(["run"])[0]
    assert (entry.file, entry.others) == ("evaluation-2.npz", ("evaluation.npz",))
    assert "gsem report run/evaluation.npz" in text_of(html([entry]))
    assert read_runs(["run/evaluation.npz"])[0].file == "evaluation.npz"


def test_signs_of_svg_and_ticks():
    assert tag("text", "<&>", class_="a", x=1.25, y=3) == '<text class="a" x="1.25" y="3">&lt;&amp;&gt;</text>'
    assert [label for _, label in linear("", 0, 30).ticks] == ["0", "10", "20", "30"]
    assert [nice(width, 5) for width in (1, 2, 4, 0.03)] == pytest.approx([0.2, 0.5, 1, 0.01])
    axis = doubling("", [0, 2, 4, 8, 512], lambda v: f"{v:g}")
    assert axis.place(0) == 0
    assert axis.place(512) == 1
    steps = np.diff([axis.place(v) for v in (2, 4, 8)])
    assert steps[0] == pytest.approx(steps[1])
    assert axis.ticks[0][1] == "0"
    assert axis.ticks[-1][1] == "512"
    assert doubling("", [100], str).ticks == ((100, "100"),)


def test_bars_are_as_long_as_their_values():
    chart = "".join(bars([("a", [Bar(0.25, 0.2, 0.5, reference=1.0, text="x")]), ("bb", [Bar(1.0)])]).parts)
    bars_drawn = re.findall(r'<rect x="([\d.]+)".*? width="([\d.]+)"', chart)
    start, widths = float(bars_drawn[0][0]), [float(width) for _, width in bars_drawn]
    assert widths[0] == pytest.approx(widths[1] / 4, abs=0.02)
    [(low, high)] = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)"', chart)
    assert [(float(x) - start) / widths[1] for x in (low, high)] == pytest.approx([0.2, 0.5], abs=0.001)
    assert "100%" in chart and "%" not in "".join(bars([("a", [Bar(0.5)])], axis=False).parts)


def test_headings_of_the_accuracies(entry):
    table = accuracies(entry)
    assert table.header == ("attack", "expected", "vote of 11", "10 queries", "noise known", "noise off")
    assert [row[0] for row in table.rows] == ["clean", ATTACKED, "worst case"]
    assert table.strong == {2}
