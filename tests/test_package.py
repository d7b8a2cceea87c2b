"""A wheel and a source distribution: built without a warning, complete, and working outside of the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import gsem

ROOT = Path(__file__).parents[1]
FILES = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"]
# What is needed and no Python file names.
DATA = ["py.typed", *(f"reporting/templates/page.{ending}" for ending in ("html.j2", "md.j2", "css", "js"))]
# Of somebody who has set nothing: with every warning shown, and without this repository on the path.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    environment = ENVIRONMENT | environment
    ran = subprocess.run(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    return ran.stdout


def complaints(out: str) -> list[str]:
    return [line for line in out.splitlines() if "warn" in line.lower() or "deprecat" in line.lower()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    here = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "src", here / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, here)
    assert complaints(run(sys.executable, "-m", "build", cwd=here)) == []
    [wheel], [source] = (here / "dist").glob("*.whl"), (here / "dist").glob("*.tar.gz")
    return wheel, source


def test_every_hint_to_install_names_this_distribution():
    """`gsem` on the package index is another program."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [
        *ROOT.glob("*.md"),
        *(file for folder in ("src", "docs", "examples") for file in (ROOT / folder).rglob("*")),
    ]
    hints = [
        (file.name, name, extra)
        for file in files
        if file.suffix in (".py", ".md")
        for name, extra in re.findall(r"pip install +'?(gsem[\w-]*)(?:\[([\w,-]+)\])?", file.read_text())
    ]
    assert len(hints) >= 2
    for file, name, extra in hints:
        assert name == project["name"] == "gsem-torch", file
        assert set(extra.split(",")) <= {"", *project["optional-dependencies"]}, file


@pytest.mark.slow
def test_both_are_named_and_complete(built):
    wheel, source = built
    name = f"gsem_torch-{gsem.__version__}"
    assert (wheel.name, source.name) == (f"{name}-py3-none-any.whl", f"{name}.tar.gz")
    modules = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src/gsem").rglob("*.py")}
    wanted = modules | {f"gsem/{name}" for name in DATA}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(source) as archive:
        in_source = set(archive.getnames())
    assert {entry for entry in in_wheel if entry.startswith("gsem/")} == wanted
    assert {f"{name}/src/{entry}" for entry in wanted} | {f"{name}/{file}" for file in FILES} <= in_source
    assert not [entry for entry in in_source if "test" in entry]


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_runs_the_demo(built, tmp_path):
    run(sys.executable, "-m", "venv", "empty", cwd=tmp_path)
    binaries = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    out = run(binaries / "pip", "install", "--constraint", ROOT / "constraints.txt", built[0], cwd=tmp_path)
    assert [line for line in complaints(out) if "gsem" in line] == []
    where = run(binaries / "python", "-c", "import gsem; print(gsem.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert run(binaries / "gsem", "--version", cwd=tmp_path).startswith(f"gsem {gsem.__version__} (torch ")
    out = run(binaries / "gsem", "demo", cwd=tmp_path, PYTHONWARNINGS="default", COLUMNS="80")
    assert complaints(out) == [] and "gsem: note" not in out
    *_, page, _, audit = out.splitlines()
    assert (page, audit) == ("report: runs/demo/report.html", "  gsem audit runs/demo --quick")
    assert "<svg" in (tmp_path / "runs/demo/report.html").read_text()
