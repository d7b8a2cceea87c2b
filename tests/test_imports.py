"""Imports point one way: data only, then mathematics, then what uses both; nobody imports the command line."""

import ast
from pathlib import Path

import pytest

import gsem

ROOT = Path(gsem.__file__).parent
BASE = {"_text", "module", "losses", "recipes", "data", "streams", "device", "fingerprint", "interrupt", "lock"}
# What each part may import of the package; a part not named here may not exist.
ALLOWED: dict[str, set[str]] = {
    **{part: set() for part in BASE},
    "probe": {"module"},
    "insert": {"module", "probe"},
    "models": {"module"},
    "contract": {"module", "streams"},
    "twin": {"module"},
    "predict": {"streams"},
    "attacks": {"contract", "losses", "predict", "streams"},
    "checkpoint": {"models", "recipes"},
    "awp": set(),
    "provenance": set(),
    "step": BASE | {"attacks", "awp", "checkpoint", "twin"},
    "recorded": {"data", "fingerprint", "recipes"},
    "run": {"_text", "checkpoint", "fingerprint", "recipes"},
    "train": BASE | {"attacks", "checkpoint", "models", "predict", "provenance", "recorded", "run", "step", "twin"},
    "suite": {"attacks"},
    "own_attack": {"attacks", "streams", "suite"},
    "result": {"_text", "checkpoint", "streams"},
    "ledger": {"_text", "checkpoint", "lock", "result", "streams"},
    "evaluate": BASE | {"attacks", "contract", "ledger", "own_attack", "predict", "result", "suite", "twin"},
    "audit": BASE
    | {"attacks", "checkpoint", "contract", "evaluate", "insert", "ledger", "predict", "result", "suite", "twin"},
    "report": {"_text", "audit", "fingerprint", "recipes", "result", "run"},
    "gallery": BASE | {"attacks", "contract", "predict", "report", "twin"},
    "compose": BASE | {"checkpoint", "contract", "gallery", "provenance", "recorded", "report", "result"},
    "cli_audit": BASE
    | {"audit", "checkpoint", "cli_evaluate", "evaluate", "ledger", "options", "progress", "result", "show", "suite"},
    "cli_list": {"_text", "data", "models", "options", "recipes", "show"},
    "cli_report": {"cli_evaluate", "compose", "options"},
    "cli_study": {"_text", "models", "options", "recipes", "run", "show", "study", "suite"},
    "cli_train": {"_text", "cli_evaluate", "cli_report", "models", "options", "progress", "recipes", "run", "train"},
    "verify": BASE | {"contract", "predict", "result"},
    "progress": {"_text", "evaluate", "run"},
    "show": {"_text", "result"},
    "study": BASE | {"checkpoint", "evaluate", "recorded", "result", "run", "train"},
    "options": {"recipes"},
    "published": BASE
    | {"checkpoint", "evaluate", "models", "progress", "published_cli", "result", "run", "show", "suite", "train"},
    # (It imports `published` when the options have been read.)
    "published_cli": {"interrupt"},
    "cli_evaluate": BASE
    | {
        "checkpoint",
        "evaluate",
        "insert",
        "ledger",
        "options",
        "progress",
        "recorded",
        "result",
        "show",
        "suite",
        "verify",
    },
    # (It names the modules of the commands as text, and imports one when its command runs.)
    "cli": {"interrupt", "options", "recipes"},
}
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


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path):
    names = imported(file)
    assert not {name.split(".")[0] for name in names} & FORBIDDEN
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    ours = {name.split(".")[1] for name in names if name.startswith("gsem.")}
    assert ours - {part} <= ALLOWED[part]
