"""Several processes: what they compute together, and what happens when one of them ends."""

import json
import textwrap

import pytest

import gsem.distributed as distributed
from processes import Ended, run

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def together(size: int, program: str) -> list[Ended]:
    """The program in several processes; `p` is what they share, `say(value)` prints JSON."""
    head = "import json, os, sys, time, torch\nfrom gsem.distributed import *\n"
    head += "p = current()\ndef say(value): print(json.dumps(value), flush=True)\n"
    return run(size, ["-c", head + textwrap.dedent(program)])


def values(ends: list[Ended]) -> list:
    assert [end.code for end in ends] == [0] * len(ends), [end.err for end in ends]
    return [json.loads(end.out) for end in ends]


def test_sums_gathers_and_what_the_first_makes_are_equal_on_all():
    found = values(
        together(
            3,
            """
            a, b = torch.arange(3.0) * (p.rank + 1), torch.full((2, 2), 10.0 ** -p.rank, dtype=torch.float64)
            p.sum_(a, b)
            c = torch.tensor([p.rank, -p.rank])
            p.max_(c)
            say([a.tolist(), b.tolist(), c.tolist(), p.gathered(p.rank * 2), p.from_first(lambda: p.rank),
                 p.any(p.rank == 2), p.any(False)])
            """,
        )
    )
    assert found == [[[0, 6, 12], [[1.11, 1.11]] * 2, [2, 0], [0, 2, 4], 0, True, False]] * 3


def test_a_counter_hands_every_number_to_one_process():
    program = """
        one, other, sum_ = p.counter(), p.counter(), p.counter()
        sum_(10 * (p.rank + 1))
        p.gathered(None)
        assert sum_(0) == 30
        say([[i for _ in range(25) if (i := one()) < 20], [i for _ in range(25) if (i := other()) < 5]])
    """
    found = values(together(2, program))
    assert sorted(i for one, _ in found for i in one) == list(range(20))
    assert sorted(i for _, other in found for i in other) == list(range(5))


@pytest.mark.parametrize(("count", "size"), [(7, 3), (2, 3), (64, 1), (0, 2)])
def test_rows_are_shared_without_gap_or_overlap(count, size):
    shares = [range(count)[distributed.Processes.rows(_at(rank, size), count)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _at(rank: int, size: int) -> distributed.Processes:
    place = distributed.Processes()
    place.rank, place.size = rank, size
    return place


def test_an_error_of_one_process_is_an_error_of_all():
    program = """
        class Mine(ValueError):
            def __init__(self, a, b): super().__init__(a + b)
        def fails(): raise Mine("what ", "failed")
        def fails_on_the_last():
            with p.together():
                assert p.rank != 1, "not here"
        for make in (lambda: p.from_first(lambda: [][0]), lambda: p.from_first(fails), fails_on_the_last,
                     lambda: p.from_first(lambda: 3)):
            try:
                say(make())
            except Exception as error:
                say([type(error).__name__, str(error)])
    """
    one, other = ([json.loads(line) for line in end.out.splitlines()] for end in together(2, program))
    assert one[0] == other[0] == ["IndexError", "list index out of range"]
    # An error that cannot be pickled arrives as its text.
    assert one[1] == ["Mine", "what failed"] and other[1] == ["OtherProcessFailed", "process 0: Mine: what failed"]
    assert other[2] == ["AssertionError", "not here"] and one[2][0] == "OtherProcessFailed"
    assert one[3] == other[3] == 3


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("doing", ["p.sum_(torch.ones(3))", "time.sleep(100)"])
def test_the_end_of_one_process_ends_all_with_one_message(victim, doing):
    program = f"""
        p.hint = "Resume by hand"
        p.sum_(torch.ones(1))
        if p.rank == {victim}:
            os.kill(os.getpid(), 9)
        {doing}
    """
    ends = together(3, program)
    assert all(end.code for end in ends)
    said = [line for end in ends for line in end.err.splitlines() if line.startswith("gsem: ")]
    assert len(said) == 1
    assert f"process {victim} (" in said[0]
    assert said[0].endswith("Resume by hand")


def test_a_process_that_raises_ends_all():
    ends = together(2, "if p.rank == 1:\n    raise KeyError('mine')\ntime.sleep(100)")
    assert all(end.code for end in ends)
    assert "process 1" in ends[0].err and "KeyError: 'mine'" in ends[0].err


def test_the_place_among_the_processes_is_read_from_torchrun_and_slurm():
    assert distributed.world({}) == distributed.World(0, 1, 0)
    assert distributed.world(TORCHRUN) == distributed.World(1, 4, 0)
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert distributed.world(slurm) == distributed.World(5, 8, 1)
    assert distributed.world({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).size == 1  # inside sbatch, not started by srun
    assert distributed._first_host("gpu[03-05,9],login") == "gpu03"
    assert distributed._first_host("login,gpu[03-05]") == "login"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": None}, "RANK is not"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"RANK": "4"}, "RANK must be 0 to 3"),
        ({"WORLD_SIZE": "0"}, "at least 1"),
        ({"WORLD_SIZE": "two"}, "integer"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(change, named):
    variables = {key: value for key, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(ValueError, match=named):
        distributed.world(variables)


def test_the_wait_at_the_start_is_set_by_a_variable(monkeypatch):
    monkeypatch.delenv("GSEM_JOIN_SECONDS", raising=False)
    assert distributed.join_seconds() == distributed.JOIN_SECONDS < 60
    monkeypatch.setenv("GSEM_JOIN_SECONDS", "300")
    assert distributed.join_seconds() == 300


@pytest.mark.parametrize("wrong", ["soon", "", "0", "-1", "inf", "nan"])
def test_a_wait_that_is_no_positive_number_is_refused(monkeypatch, wrong):
    monkeypatch.setenv("GSEM_JOIN_SECONDS", wrong)
    with pytest.raises(ValueError, match="positive number of seconds"):
        distributed.join_seconds()
