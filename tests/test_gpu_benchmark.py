"""The GPU benchmark's helpers, and its check of correctness on a CPU with tiny sizes."""

import ast
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gsem
from gsem.training.cuda_graph import GraphedAttack
from gsem.training.step import Stepper
from recorded_graph import RecordedGraph

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _benchmarks_found(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def verdicts(out: Path, part: str = "check") -> dict[str, str]:
    return {row["what"]: row["verdict"] for row in json.loads((out / f"{part}.json").read_text())["rows"]}


def set_to_zero(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})


def left_to_the_kernel(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def with_momentum(how):
    """The stepper's `new_optimizer`, followed by `how`."""
    plain = Stepper.new_optimizer

    def new_optimizer(stepper: Stepper) -> None:
        plain(stepper)
        how(stepper.optimizer)

    return new_optimizer


def sgd_verdict() -> str:
    import gpu_check
    from gpu_report import Report

    report = Report("check", CPU, {})
    gpu_check.sgd_after_overflow(report, gpu_check.Case(CPU, 2, 8))
    (row,) = report.rows
    return row.verdict


@pytest.mark.parametrize(("how", "verdict"), [(set_to_zero, "ok"), (left_to_the_kernel, "FAIL")])
def test_momentum_that_an_overflow_left_uninitialised_is_found(monkeypatch, how, verdict):
    monkeypatch.setattr(Stepper, "new_optimizer", with_momentum(how))
    assert sgd_verdict() == verdict


def test_our_fused_sgd_equals_plain_sgd_after_an_overflow():
    assert sgd_verdict() == "ok"


def test_the_check_passes_on_a_cpu_without_the_command_lines_packages(tmp_path, monkeypatch, capsys):
    for missing in ("tyro", "pooch", "pyautoattack"):
        monkeypatch.setitem(sys.modules, missing, None)  # an import of it fails
    import gpu

    monkeypatch.setattr(Stepper, "new_optimizer", with_momentum(set_to_zero))
    code = gpu.main(["check", "--device", "cpu", "--batch", "2", "--side", "8", "--out", str(tmp_path)])
    found = verdicts(tmp_path)
    assert len(found) == 13
    assert {what for what, verdict in found.items() if verdict != "ok"} == set()
    assert code == 0
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert all(what in table for what in found)


def imported(name: str, seen: dict[str, set[str]]) -> None:
    """What a file of benchmarks/ imports, also inside functions, and what the files import that it imports."""
    tree = ast.parse((BENCHMARKS / f"{name}.py").read_text())
    found = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    seen[name] = found
    for other in found - seen.keys():
        if (BENCHMARKS / f"{other}.py").exists():
            imported(other, seen)


def test_no_part_needs_the_command_line_or_a_package_beyond_those_named():
    seen: dict[str, set[str]] = {}
    imported("gpu", seen)
    assert {"gpu_check", "gpu_step", "gpu_run", "autoattack"} < seen.keys()
    every = set().union(*seen.values()) - seen.keys()
    packages = {name.partition(".")[0] for name in every} - sys.stdlib_module_names
    assert packages <= {"torch", "numpy", "gsem", "pyautoattack"}  # (the last where it is installed)
    assert not [name for name in every if name.startswith("gsem.cli")]


def test_a_failing_check_fails_the_part_after_all_others_ran(tmp_path, monkeypatch):
    import gpu
    import gpu_check

    def broken(report, case):
        raise ValueError("broken")

    figures = {"exact": 0.0, "rounding": 1e-7, "far": 0.1, "not a number": float("nan")}
    checks = {"raises": broken}
    checks |= {name: lambda report, case, name=name: report.at_most(name, figures[name], 1e-6) for name in figures}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    assert gpu.main(["check", "--device", "cpu", "--out", str(tmp_path)]) == 1
    failing = {"raises": "FAIL", "far": "FAIL", "not a number": "FAIL"}
    assert verdicts(tmp_path) == failing | {"exact": "ok", "rounding": "ok"}


def test_fp16_gradients_that_vanish_are_found(tmp_path, monkeypatch):
    import gpu_check
    from gpu_report import Report

    from gsem.nn import folded

    monkeypatch.setattr(folded, "FP16_TARGET", 1e-30)  # as if nothing had been scaled
    report = Report("check", CPU, {})
    gpu_check.low_precision_gradients(report, gpu_check.Case(CPU, 2, 8))
    assert {row.what for row in report.rows if row.verdict == "FAIL"} == {
        row.what for row in report.rows if row.what.startswith("fp16")
    }


class NotReplayed(RecordedGraph):
    def replay(self) -> None:
        pass


@pytest.mark.parametrize(("make", "verdict"), [(RecordedGraph, "ok"), (NotReplayed, "FAIL")])
def test_a_graph_that_gives_other_points_is_found(monkeypatch, make, verdict):
    import gpu_check
    from gpu_report import Report

    monkeypatch.setattr("gsem.training.step.graphed_attack", lambda device: GraphedAttack(make))
    report = Report("check", CPU, {})
    gpu_check.attack_as_cuda_graph(report, gpu_check.Case(CPU, 2, 8))
    assert [row.verdict for row in report.rows] == ["ok", verdict] * 3


def test_where_nothing_can_be_compiled_the_part_has_a_line_with_the_reason_and_passes(monkeypatch):
    import gpu_step
    from gpu_report import Report
    from torch._dynamo.exc import TorchDynamoException

    def no_compiler(options):
        raise TorchDynamoException("no C++ compiler\nand more")

    monkeypatch.setattr(gpu_step, "Sides", no_compiler)
    report = Report("step", CPU, {})
    report.attempt(gpu_step.COMPILING, lambda: gpu_step.compiled(report, None, 5.0))
    assert [row.what for row in report.rows] == [gpu_step.COMPILING] and not report.failed
    assert report.rows[0].value.endswith("no C++ compiler")


def test_every_side_is_warmed_up_and_timed_in_turns():
    from timing import in_turns

    calls: list[str] = []
    times = in_turns(CPU, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warm_ups=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_the_device_that_was_asked_for_is_waited_for(monkeypatch):
    from timing import taken

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    taken(torch.device("cuda:1"), lambda: None)
    assert waited == [torch.device("cuda:1")] * 2


def test_time_limits_nest():
    from timing import OverTime, time_limit

    with time_limit(60, "outer"):
        with pytest.raises(OverTime) as stopped, time_limit(0.02, "inner"):
            time.sleep(5)
        assert stopped.value.what == "inner"

    def outlives_the_inner_limit() -> None:
        with time_limit(0.01, "inner"):
            pass
        time.sleep(5)

    with pytest.raises(OverTime) as stopped, time_limit(0.04, "outer"):
        outlives_the_inner_limit()
    assert stopped.value.what == "outer"
    time.sleep(0.05)  # no timer is left


def test_launches_and_waits_are_counted_by_the_names_of_the_runtimes_calls():
    from timing import counted_launches, kernel_launches

    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "aten::add", "volta_gemm"]
    names += ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaGraphLaunch"]
    assert counted_launches(names) == {"launches": 4, "waits": 2}
    assert kernel_launches(CPU, lambda: None) == "not counted on cpu"


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_put_back(allowed):
    from timing import tf32, tf32_settings

    former = tf32_settings()
    with tf32(allowed):
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    assert tf32_settings() == former


def test_the_training_is_measured_and_each_part_of_a_step_runs():
    import gpu
    import gpu_run
    import gpu_step
    from gpu_report import Report
    from training_step import Sides

    words = ["--device", "cpu", "--model", "gsem-resnet10x16", "--batch", "4", "--side", "8"]
    o = gpu.arguments(["step", *words])
    recipe = replace(gsem.RECIPES["gcat"], model="gsem-resnet10x16", batch_size=8, epochs=3)
    assert 1 <= gpu_run.fitting_epochs(Report("train", CPU, {}), recipe, CPU, 0.1) <= 3
    for work, _ in Sides(gpu_step.options(o, "--compile", "off")).parts().values():
        work()
