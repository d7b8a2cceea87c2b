"""Help texts and `import gsem` load nothing slow; every public name is there when it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gsem
from gsem.cli.main import COMMANDS

ROOT = Path(gsem.__file__).parent

# What takes longer to import than a help text takes to print.
SLOW = {"torch", "numpy", "scipy", "sklearn", "PIL", "jinja2", "jaxtyping", "safetensors", "pooch"}
WRONG = [["evaluat"], ["train", "gcta"], ["train", "--epohcs", "3"], ["study", "ablaton"], ["evaluate"]]
HELP = """
import sys
from gsem.cli.main import main

for words in (["--help"], ["--version"], [], *([command, "--help"] for command in {commands!r})):
    main(words)
    loaded = {slow!r} & sys.modules.keys()
    assert not loaded, (words, loaded)
for words in {wrong!r}:
    assert main(words) == 2
    loaded = {slow!r} & sys.modules.keys()
    assert not loaded, (words, loaded)
"""


def python(script: str) -> str:
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_help_and_wrong_words_load_nothing_slow():
    python(HELP.format(commands=list(COMMANDS), slow=SLOW, wrong=WRONG))


@pytest.mark.parametrize("script", ["train_gsem.py", "evaluate_gsem.py"])
def test_the_help_of_the_papers_scripts_loads_nothing_slow(script):
    file = Path(__file__).parents[2] / script
    out = python(
        f"import runpy, sys\nsys.argv = ['script', '--help']\n"
        f"try:\n    runpy.run_path({str(file)!r}, run_name='__main__')\n"
        f"finally:\n    assert not {SLOW} & sys.modules.keys()"
    )
    assert "--dataset-name" in out or "--dataset_name" in out


def test_importing_the_package_loads_nothing_slow():
    python(f"import sys, gsem; gsem.__version__, dir(gsem); assert not {SLOW} & sys.modules.keys()")


def test_all_public_names_together_load_no_statistics():
    """scipy.stats takes most of a second: only what computes a quantile of it loads it."""
    found = python("import sys\nfrom gsem import *\nimport gsem.cli.study\nprint(sorted(sys.modules))")
    assert "'torch'" in found and "'gsem.evaluation.verify'" in found and "'gsem.study'" in found
    assert "scipy" not in found and "sklearn" not in found


def test_every_module_is_reached_by_the_path_that_names_it():
    """No public function has the name of a submodule, so that `import gsem.a.b as c` works for every module. (The
    attacks alone are functions in modules of their names.)"""
    files = [file for file in ROOT.rglob("[!_]*.py") if file.parent.name != "attacks"]
    modules = [".".join(("gsem", *file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    lines = [f"import {module} as m; assert inspect.ismodule(m), {module!r}" for module in modules]
    python("\n".join(["import inspect, gsem", *lines, "assert inspect.isfunction(gsem.audit)"]))


def test_the_names_are_those_that_type_checkers_see():
    """The imports for type checkers, the table of where names are defined, `__all__` and `dir` say the same."""
    tree = ast.parse(Path(gsem.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert all(name == origin for name, (_, origin) in seen.items())
    assert {name: module for name, (module, _) in seen.items() if module != "gsem"} == gsem._DEFINED_IN
    assert seen.keys() == set(gsem.__all__) and set(gsem.__all__) <= set(dir(gsem))
    for name, (module, _) in seen.items():
        value = getattr(gsem, name)
        assert module == "gsem" or value is getattr(sys.modules[module], name)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gsem' has no attribute 'trian'"):
        gsem.trian  # noqa: B018
    with pytest.raises(ImportError, match="trian"):
        from gsem import trian  # noqa: F401
    assert not hasattr(gsem, "__main__")  # (importing it would run the command line)


def test_a_public_name_can_be_replaced(monkeypatch):
    before = gsem.train
    monkeypatch.setattr(gsem, "train", print)
    assert gsem.train is print
    monkeypatch.undo()
    assert gsem.train is before
