"""Imports run one way: a part of the package imports from lower floors and from itself, and nobody the command line."""

import ast
from pathlib import Path

import pytest

import gsem

ROOT = Path(gsem.__file__).parent
FLOORS = [
    {"_world"},
    {"losses", "rng", "_io", "_text", "_env", "_fingerprint", "_lock", "_interrupt"},
    {"distributed"},
    {"nn"},
    {"data"},
    {"attacks"},
    {"training", "evaluation"},
    {"auditing", "study"},
    {"reporting"},
    {"cli"},
]
FORBIDDEN = {"torchvision", "timm", "torchattacks"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_a_floor():
    parts = {part_of(file) for file in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert parts == set.union(*FLOORS)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file: Path):
    names = imported(file)
    assert not {name.split(".")[0] for name in names} & FORBIDDEN
    if file.name in ("__init__.py", "__main__.py") and file.parent == ROOT:
        return
    part = part_of(file)
    floor = next(number for number, parts in enumerate(FLOORS) if part in parts)
    ours = {name.split(".")[1] for name in names if name.startswith("gsem.")} - {part, "__version__"}
    assert ours <= set().union(*FLOORS[:floor])
