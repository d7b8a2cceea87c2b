"""What the README shows runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


def test_all_its_python_is_found():
    """A block of Python under another heading would not be run."""
    kinds = re.findall(r"^ *```(\w*)", README, re.M)[::2]
    assert set(kinds) == {"", "python"} and kinds.count("python") == len(BLOCKS) > 0
    plain = re.findall(r"^ *```\n(.*?)^ *```", README, re.S | re.M)
    assert not [block for block in plain if re.search(r"^(from|import) \w|\w\(.*\)$", block, re.M)]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_its_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_python_of_the_how_to_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/how-to/python.md").read_text(), re.S | re.M)
    short = block.replace("scaled(2)", "scaled(1)").replace("[:50]", "[:10]")
    exec(compile(short, "python.md", "exec"), {"__name__": "__main__"})


def test_the_python_of_the_page_on_own_networks_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "own-networks.md").read_text(), re.S | re.M)
    exec(compile(block, "own-networks.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "runs" / "mine" / "recipe.json").is_file()
