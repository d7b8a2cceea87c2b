"""Every example runs, and prints what it promises."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words: str, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert all(len(line) <= 80 for line in ran.stdout.splitlines())
    return ran.stdout


def accuracies(out: str) -> list[float]:
    lines = "\n".join(line for line in out.splitlines() if not line.startswith("epoch"))
    return [float(number) for number in re.findall(r"(?:clean|pgd20-eot5) +(\d+\.\d)% +\d", lines)]


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in here] == []


def test_insert(tmp_path):
    out = run(str(EXAMPLES / "01_insert.py"), cwd=tmp_path)
    assert "two calls agree: False\n" in out
    assert "two calls agree, noise frozen: True\n" in out
    masked, corrected = re.search(r"norm: (\d\.\d+) semi-masked, (\d\.\d+) corrected", out).groups()
    assert masked != corrected


@pytest.mark.slow
def test_train_and_evaluate(tmp_path):
    out = run(str(EXAMPLES / "02_train_and_evaluate.py"), cwd=tmp_path)
    assert "epoch 8/8" in out
    clean, masked, clean_again, corrected = accuracies(out)
    assert clean == clean_again > 70  # the setting of the gradient does not touch the output
    assert max(masked, corrected) < clean - 10
    again = run(str(EXAMPLES / "02_train_and_evaluate.py"), cwd=tmp_path)
    assert "epoch" not in again
    assert accuracies(again) == accuracies(out)


@pytest.mark.slow
def test_your_own_network(tmp_path):
    file = shutil.copy(EXAMPLES / "03_your_own_network.py", tmp_path)
    clean, robust = accuracies(run(str(file), cwd=tmp_path))
    assert clean > 90
    assert 40 < robust < clean - 5
    # The command line finds the same network by module:function, and the same figures.
    words = re.search(r"^ +gsem (evaluate .*)$", Path(file).read_text(), re.M)[1].split()
    assert accuracies(run("-m", "gsem", *words, cwd=tmp_path)) == [clean, robust]
