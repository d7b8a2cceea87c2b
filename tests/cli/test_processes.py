"""--processes N and torchrun through the real command line: how several processes start, print and end."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gsem.cli.launch as launch
from gsem._env import device_named
from gsem._lock import locked
from gsem._world import World
from gsem.cli.main import read
from processes import environment, free_port

# A network whose factory does what the variable ACT names, in each process.
NETWORK = """
import os, time
def make():
    act, mine = os.environ["ACT"].split(":")
    if mine in ("", os.environ["RANK"]):
        if act == "kill":
            os.kill(os.getpid(), 9)
        if act == "exit":
            os._exit(7)
        if act == "raise":
            raise ValueError("made no network")
        if act == "ready":
            print("ready", flush=True)
    time.sleep(100)
"""
EVALUATE = ("evaluate", "network:make", "--data", "digits")
SOURCE = str(Path(launch.__file__).parents[2])
SECONDS = 100


def begin(words, folder, **variables) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": SOURCE} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=folder, env=env, **pipes)


def gsem(*words, folder, **variables) -> tuple[int, str, str]:
    running = begin(("gsem", *words), folder, **variables)
    try:
        out, err = running.communicate(timeout=SECONDS)
    finally:
        running.terminate()
    return running.returncode, out, err


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "network.py").write_text(NETWORK)
    return tmp_path


@pytest.mark.parametrize(
    ("act", "code", "named"),
    [
        ("kill:1", 137, ("process 1 (process id ", "SIGKILL", "resumes")),
        ("kill:0", 137, ("process 0 (process id ", "SIGKILL", "resumes")),
        ("exit:1", 7, ("process 1 (process id ", "exit code 7")),
        ("raise:", 2, ("made no network",)),
        ("raise:1", 2, ("made no network",)),
    ],
)
def test_all_end_with_one_message(folder, act, code, named):
    found, out, err = gsem(*EVALUATE, "--processes", "2", folder=folder, ACT=act)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert all(text in err for text in named)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_all_with_one_message(folder, number, code):
    running = begin(("gsem", *EVALUATE, "--processes", "2"), folder, ACT="ready:")
    try:
        assert [running.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        running.send_signal(number)
        _, err = running.communicate(timeout=SECONDS)
    finally:
        running.kill()
    assert running.returncode == code
    assert err.count("\n") == 1 and "stopped" in err


def test_the_end_of_the_launcher_ends_all(folder):
    running = begin(("gsem", *EVALUATE, "--processes", "2"), folder, ACT="ready:")
    assert [running.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    running.kill()
    _, err = running.communicate(timeout=SECONDS)  # (to the end of the last process that has the pipe)
    assert err.count("\n") == 1 and "launcher" in err


def test_under_torchrun_one_process_names_the_killed_one(folder):
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gsem")
    running = begin((*words, *EVALUATE), folder, ACT="kill:1")
    _, err = running.communicate(timeout=SECONDS)
    assert running.returncode
    ours = [line for line in err.splitlines() if line.startswith("gsem: ")]
    assert len(ours) == 1 and "process 1 (process id " in ours[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": None}, "RANK is not"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"RANK": "2"}, "RANK must be 0 to 1"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK must be an integer"),
    ],
)
def test_variables_that_do_not_fit_are_one_error(tmp_path, change, named):
    place = {
        name: environment(0, 2, free_port())[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    variables = {name: value for name, value in (place | change).items() if value is not None}
    code, out, err = gsem(*EVALUATE, folder=tmp_path, **variables)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_a_port_in_use_is_one_error(folder):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = gsem(*EVALUATE, folder=folder, ACT="ready:", **_place(0, port))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"port {port} is in use" in err


def _place(rank: int, port: int) -> dict[str, str]:
    return {
        k: v for k, v in environment(rank, 2, port).items() if k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }


def test_of_several_processes_the_first_prints(tmp_path):
    for words in (("recipes",), ("train", "--help"), ("train", "nothing"), ("--version",)):
        first, other = (gsem(*words, folder=tmp_path, **_place(rank, 1)) for rank in range(2))
        assert first[1] + first[2]
        assert other[1:] == ("", "")
        assert first[0] == (2 if "nothing" in words else 0)


TINY = ("--epochs", "1", "--warmup", "0", "--steps", "1", "--steps-per-epoch", "1")


def test_a_second_start_in_a_run_directory_is_one_error(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run/.lock", "training in run", "wait"):
        words = ("train", "--data", "digits", "--out", "run", *TINY, "--processes", "2")
        code, _, err = gsem(*words, folder=tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"process {os.getpid()} on this host" in err


def test_more_processes_than_images_in_a_batch_is_one_error(tmp_path):
    words = ("train", "--data", "digits", "--out", "run", *TINY, "--batch-size", "1", "--processes", "2")
    code, _, err = gsem(*words, folder=tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "1 image" in err and "2 processes" in err


ALONE, OF_TWO = World(0, 1, 0), World(1, 2, 1)


@pytest.mark.parametrize(
    ("given", "place", "gpus", "expected"),
    [
        ([], ALONE, 0, 1),
        (["--processes", "3"], ALONE, 0, 3),
        (["--processes", "1"], ALONE, 0, 1),
        (["--processes", "2"], OF_TWO, 0, 1),
        (["--processes", "auto"], ALONE, 4, 4),
        (["--processes", "8", "--device", "cpu"], ALONE, 4, 8),
        (["--processes", "3"], OF_TWO, 0, "2 were started"),
        (["--processes", "0"], ALONE, 0, "at least 1"),
        (["--processes", "auto"], ALONE, 0, "--processes N"),
        (["--processes", "8"], ALONE, 4, "torch sees 4 GPUs"),
        (["--processes", "2", "--device", "cuda:1"], ALONE, 4, "cuda:1"),
    ],
)
def test_how_many_processes_are_started(monkeypatch, given, place, gpus, expected):
    _pretend_gpus(monkeypatch, gpus)
    for options in (read("train", given), read("evaluate", ["m", *given])):
        if isinstance(expected, int):
            assert launch.processes_to_start(options, place) == expected
        else:
            with pytest.raises(ValueError, match=expected):
                launch.processes_to_start(options, place)


def _pretend_gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    _pretend_gpus(monkeypatch, 2)
    fifth = World(5, 8, 1)
    assert str(device_named(None, fifth)) == str(device_named("cuda", fifth)) == "cuda:1"
    assert device_named("cpu", fifth).type == "cpu"
    assert str(device_named("cuda:1", ALONE)) == "cuda:1"
    for name, place in (("cuda:1", fifth), (None, World(2, 3, 2))):
        with pytest.raises(ValueError):
            device_named(name, place)
    # srun may let each of its processes see one GPU, which is the first for each.
    _pretend_gpus(monkeypatch, 1)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert str(device_named(None, fifth)) == "cuda:0"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ValueError, match="1 GPU"):
        device_named(None, fifth)


def test_the_processes_of_a_launch_share_the_cores(tmp_path, monkeypatch):
    (tmp_path / "network.py").write_text(
        "import os, torch\n"
        "def make():\n"
        "    print(torch.get_num_threads(), os.environ['TORCH_CPP_LOG_LEVEL'], flush=True)\n"
        "    raise ValueError('seen')\n"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    _, out, _ = gsem(*EVALUATE, "--processes", "2", folder=tmp_path)
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out.splitlines()[0] == f"{each} ERROR"
