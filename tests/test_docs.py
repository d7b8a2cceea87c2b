"""The documentation site: every page is reached, every public name described, every command parses; and it builds."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

import gsem
from gsem.cli.main import COMMANDS, read

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom")
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorials" and page.stem != "index"]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(DOCS)) for page in pages]


def blocks(page: Path) -> list[str]:
    """The contents of the blocks between fences that are commands or output: without a language, or console."""
    return re.findall(r"^```(?:console)?\n(.*?)^```$", page.read_text(), re.S | re.M)


def gsem_commands(text: str) -> list[str]:
    """The lines that begin with `gsem COMMAND` or `$ gsem COMMAND`, with the lines that continue them."""
    found = re.findall(rf"^(?:\$ )?gsem ((?:{'|'.join(COMMANDS)})\b(?:.*\\\n)*.*)$", text, re.M)
    return [re.sub(r"\\\n\s*", "", command) for command in found]


def test_every_page_is_reached_from_the_start_page():
    reached, waiting = set(), ["index"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        file = DOCS / f"{page}.md"
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", file.read_text(), re.S | re.M):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            waiting += [os.path.relpath(file.parent / entry, DOCS) for entry in entries]
    assert reached == {name.removesuffix(".md") for name in names(PAGES)}


def test_every_public_name_is_in_the_api_reference():
    described = set()
    for page in (DOCS / "api").glob("*.md"):
        described |= set(re.findall(r"^\.\. (?:auto\w+|py:\w+):: (\S+)", page.read_text(), re.M))
    public = {f"gsem.{name}" for name in gsem.__all__} - {"gsem.attacks", "gsem.data", "gsem.losses"}
    for part in ("attacks", "data", "auditing", "reporting"):
        text = (ROOT / "src" / "gsem" / part / "__init__.py").read_text()
        public |= {f"gsem.{part}.{name}" for name in re.findall(r" import \w+ as (\w+)", text)}
    assert public - described == set()


def test_every_command_of_the_command_line_is_in_the_api_reference():
    text = (DOCS / "api" / "command-line.md").read_text()
    assert set(re.findall(r"^```\{gsem-help\} (\w+)$", text, re.M)) == set(COMMANDS)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page):
    for command in (command for block in blocks(page) for command in gsem_commands(block)):
        plain = re.sub(r"\s#\s.*$|\[.*?\]|…", "", command)  # comments; options in brackets are alternatives
        name, *words = shlex.split(plain)
        if "--resume" in words or {"SEED", "NORM"} & set(words):  # it needs the run, or stands for several commands
            continue
        read(name, words)


def test_every_tutorial_runs_commands_and_has_their_output():
    runner = tutorials_runner()
    for page in TUTORIALS:
        text = page.read_text()
        found = runner.BLOCK.findall(text)
        assert found and all(runner.commands(block) for block in found), page.name
        for block in found:
            # Each command is followed by what it printed.
            assert len(re.split(r"^\$ (?:.*\\\n)*.*\n", block, flags=re.M)) == len(runner.commands(block)) + 1
            assert not block.rstrip().splitlines()[-1].startswith("$ "), page.name
        (last,) = runner.LAST_RUN.findall(text)
        assert re.search(r"\d+ \w+ \d{4}, gsem \d+\.\d+\.\d+", last), page.name


def test_every_script_of_a_tutorial_is_an_example():
    shown = {
        script for page in TUTORIALS for script in re.findall(r"\{literalinclude\} \.\./\.\./(\S+)", page.read_text())
    }
    assert shown and all((ROOT / script).is_file() for script in shown)
    # What a page includes is what it runs.
    for page in TUTORIALS:
        for script in re.findall(r"\{literalinclude\} \S+/(\S+\.py)", page.read_text()):
            assert re.search(rf"^\$ python .*{script}$", page.read_text(), re.M)


def tutorials_runner():
    spec = importlib.util.spec_from_file_location("run_tutorials", DOCS / "run_tutorials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runner_writes_outputs_and_the_date(tmp_path):
    runner = tutorials_runner()
    page = "```console\n$ echo one \\\n    two\nold\n$ echo three\n```\n\n*Last run: never.*\n"
    again = runner.rerun(page, "today")
    assert again == "```console\n$ echo one \\\n    two\none two\n$ echo three\nthree\n```\n\n*Last run: today.*\n"
    with pytest.raises(RuntimeError, match="code 3"):
        runner.rerun("```console\n$ exit 3\n```\n", "today")


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_tutorial_runs_to_its_end(page):
    """With the same commands and the same attacks in its tables. (Figures depend on the processor.)"""

    def attacks(text: str) -> list[str]:
        return re.findall(r"^([a-z]+[\w@-]*) +\d+\.\d% +\d", text, re.M)

    again = tutorials_runner().rerun(page.read_text(), "today")
    assert attacks(again) == attacks(page.read_text())


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.anchors |= {known[key] for key in ("id", "name") if known.get(key)}
        self.links += [known[key] for key in ("href", "src") if known.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr[-3000:]
    assert re.search(
        r"^\t\$\(BIN\)/sphinx-build -W --keep-going -q docs docs/_build$", (ROOT / "Makefile").read_text(), re.M
    )
    return out


@pytest.mark.slow
def test_no_internal_link_is_dead(site):
    pages = {page: Links(page) for page in site.rglob("*.html")}
    dead, checked = [], 0
    for page, found in pages.items():
        for link in found.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            checked += 1
            anchors = pages[target].anchors if target in pages else {""}
            if not target.exists() or (target in pages and unquote(parts.fragment) not in anchors):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert checked > 1000 and dead == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    """A reader without a network sees the whole site."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(https?:|//)|<link rel="stylesheet"[^>]+href="(https?:|//)',
            page.read_text(),
        )
        assert loaded == [], page.name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_search_finds_a_function_and_a_page(site):
    for words, wanted in (("insert", "tutorials/insert.html"), ("straight_through", "api/nn.html")):
        shown = subprocess.run(
            ["chromium", *OPTIONS, f"file://{site}/search.html?q={words}"],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        assert wanted in shown.split('id="search-results"')[1], words
