"""What an evaluation prints while it runs, where there is no terminal."""

import io

import pytest
from rich.console import Console

from gsem.cli.progress import AttackBar
from gsem.evaluation.evaluate import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines():
    """Prints a progress at a time, and returns the lines so far."""
    clock, file = Clock(), io.StringIO()
    bar = AttackBar(Console(file=file, width=80), clock)

    def at(seconds: float, name: str, done: int, accuracy: float, left: float | None = None) -> list[str]:
        clock.now = seconds
        bar(Progress(name, done, 400, 0 if done == 400 else 50, accuracy, 100.0, left))
        return file.getvalue().splitlines()

    return at


def test_a_line_now_and_then_and_one_when_an_attack_is_finished(lines):
    assert lines(1, "clean", 256, 0.99) == []
    assert lines(2, "clean", 400, 0.98) == ["clean                400/400 images, 98.0%, 1 s"]
    for seconds in range(3, 32):
        assert len(lines(seconds, "pgd100-eot20", 0, 0.9)) == 1
    assert lines(32, "pgd100-eot20", 0, 0.85)[1:] == ["pgd100-eot20         0/400 images, 85.0% so far, 29 s so far"]
    for seconds in range(33, 62):
        assert len(lines(seconds, "pgd100-eot20", 256, 0.8, 70)) == 2
    assert lines(62, "pgd100-eot20", 256, 0.75, 70)[2:] == [
        "pgd100-eot20         256/400 images, 75.0% so far, 1:10 min left"
    ]
    assert lines(63, "pgd100-eot20", 400, 0.7, 0)[3:] == ["pgd100-eot20         400/400 images, 70.0%, 1:00 min"]


def test_on_a_terminal_there_are_no_lines():
    file = io.StringIO()
    with AttackBar(Console(file=file, width=80, force_terminal=True)) as bar:
        bar(Progress("clean", 400, 400, 0, 0.98, 100.0, 0.0))
    assert "400/400 images" not in file.getvalue()
