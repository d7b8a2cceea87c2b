"""A lock is held by one, blocks nobody after its holder's death, and names its holder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gsem._lock
from gsem._lock import Locked, locked


def lock(file):
    return locked(file, "training in runs/x", "wait for its end")


def planted(file, **change):
    """The lock of a process that has ended, changed."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    holder = {"pid": process.pid, "host": socket.gethostname(), "started": "1", "since": "2026-01-01 00:00:00"}
    file.write_text(json.dumps(holder | change))
    return process.pid


def refused(file) -> str:
    with pytest.raises(Locked) as error, lock(file):
        pass
    return str(error.value)


def test_one_holds_it_and_it_is_gone_at_the_end(tmp_path):
    file = tmp_path / ".lock"
    with lock(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        assert "this process itself is training in runs/x, since 20" in refused(file)
        assert file.exists()  # the refused one did not take it along
    assert not file.exists()
    with pytest.raises(KeyError), lock(file):
        raise KeyError
    assert not file.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a zombie is known by /proc")
def test_a_living_process_is_named_and_a_killed_one_holds_nothing(tmp_path):
    file = tmp_path / ".lock"
    # (The module alone: the package takes seconds to import.)
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from _lock import locked\n"
        "with locked(Path(sys.argv[2]), 'training in runs/x', 'wait for its end'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(Path(gsem._lock.__file__).parent), str(file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        message = refused(file)
        assert message.startswith(f"process {process.pid} on this host is training in runs/x, since 20")
        assert message.endswith(": wait for its end")
        process.kill()
        while "Z" not in Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.01)
        # Dead, though its parent has not asked for its end yet.
        with lock(file):
            assert json.loads(file.read_text())["pid"] == os.getpid()


def test_what_a_dead_process_left_is_taken_over(tmp_path):
    file = tmp_path / ".lock"
    planted(file)
    with lock(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    # Its number may have been given to another process since.
    planted(file, pid=os.getpid())
    with lock(file):
        pass
    assert not file.exists()


def test_of_another_host_nothing_is_known(tmp_path):
    file = tmp_path / ".lock"
    pid = planted(file, host="node7")
    message = refused(file)
    assert f"process {pid} on host node7 is training in runs/x, since 2026-01-01 00:00:00: wait for its end" in message
    assert f"If process {pid} does not run there any more, delete {file}" in message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_lock_without_content_is_free_when_it_is_old(tmp_path, content):
    file = tmp_path / ".lock"
    file.write_text(content)
    assert f"delete {file}" in refused(file)
    os.utime(file, (time.time() - 60,) * 2)
    with lock(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path):
    file = tmp_path / ".lock"
    planted(file)
    held, most, others, gate = 0, 0, 0, threading.Barrier(8)
    guard = threading.Lock()

    def work() -> None:
        nonlocal held, most, others
        gate.wait()
        try:
            with lock(file):
                with guard:
                    held += 1
                    most = max(most, held)
                time.sleep(0.05)
                with guard:
                    held -= 1
        except Locked:
            with guard:
                others += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and others >= 1 and not file.exists()


def test_a_file_system_that_locks_no_folders(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*words):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    planted(tmp_path / ".lock")
    with lock(tmp_path / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*words):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"\.lock cannot be written: No space left"), lock(tmp_path / ".lock"):
            pass
    assert list(tmp_path.iterdir()) == []
