"""Kills a random process of a training or an evaluation at a random moment, again and again, and resumes.

    python benchmarks/faults.py --kills 20 --processes 2

Each time: all processes end within a minute; exactly one line names what happened; the same command (a training:
--resume) then ends with the result of an undisturbed run on the same number of processes. Digits, on the CPU.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file

from gsem._lock import is_dead, this_process

END_SECONDS = 60.0
"""All processes must have ended so long after the kill."""
TRAIN = shlex.split(
    "train gcat --data digits --device cpu --epochs 4 --warmup 0 --steps 2 --batch-size 64 --steps-per-epoch 12"
)
EVALUATE = shlex.split(
    "evaluate trained --images 96 --batch-size 12 --draws 20 --attacks clean,pgd:steps=15 --device cpu"
)


def start(words: list[str], o: argparse.Namespace, log: Path) -> subprocess.Popen:
    if o.torchrun:
        first = ["torch.distributed.run", "--standalone", f"--nproc-per-node={o.processes}", "-m", "gsem", *words]
    else:
        first = ["gsem", *words, "--processes", str(o.processes)]
    with log.open("w") as out:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", *first], cwd=log.parent, env=env, stdout=out, stderr=out)


def run(words: list[str], o: argparse.Namespace, log: Path) -> float:
    """To its end. Seconds since its processes were started."""
    running = start(words, o, log)
    wait_for_children(running)
    began = time.monotonic()
    code = running.wait()
    if code:
        raise SystemExit(f"gsem {' '.join(words)} ended with {code}: {log.read_text()}")
    return time.monotonic() - began


def wait_for_children(running: subprocess.Popen) -> None:
    while running.poll() is None and not children(running.pid):
        time.sleep(0.05)


def children(of: int) -> list[dict]:
    """The processes that a launcher started, in the order of their start: as `is_dead` takes them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == of:
            found.append(this_process() | {"pid": pid, "started": fields[19]})
    return sorted(found, key=lambda process: process["pid"])


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """All numbers of a result that must be equal."""
    if name.startswith("training"):
        run_ = folder / name
        metrics = [json.loads(line) for line in (run_ / "metrics.jsonl").read_text().splitlines()]
        found = {f"{i}.{k}": np.array(m[k]) for i, m in enumerate(metrics) for k in m if k != "seconds"}
        for kind in ("best", "last"):
            found |= {f"{kind}.{k}": v for k, v in load_file(run_ / f"checkpoints/{kind}.safetensors").items()}
        return found
    with np.load(folder / f"{name}.npz", allow_pickle=False) as saved:
        return {k: saved[k] for k in saved.files if "seconds" not in k and saved[k].dtype.kind in "biuf"}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=True) for k in one)


def kill_once(
    number: int, seconds: dict[str, float], o: argparse.Namespace, folder: Path, chance: random.Random
) -> bool:
    """One kill and its resume. Whether all is as it must be; prints a line."""
    kind = ("training", "evaluation")[number % 2]
    name, log = f"{kind}-{number}", folder / f"log-{number}"
    words = [*(TRAIN if kind == "training" else EVALUATE), "--out", name]
    running = start(words, o, log)
    wait_for_children(running)
    moment = chance.uniform(0, seconds[kind])
    time.sleep(moment)
    ours = children(running.pid)
    choice = chance.randrange(o.processes + 1)  # one of the processes, or (seldom) what launched them
    victim, what = (ours[choice], f"child {choice}") if choice < len(ours) else ({"pid": running.pid}, "launcher")
    ended = [process for process in ours if is_dead(process)]
    if running.poll() is None and victim not in ended and ended != ours:
        os.kill(victim["pid"], signal.SIGKILL)
    else:
        what = "had ended"
    killed = time.monotonic()
    while (running.poll() is None or not all(map(is_dead, ours))) and time.monotonic() < killed + END_SECONDS:
        time.sleep(0.1)
    took, hung = time.monotonic() - killed, running.poll() is None or not all(map(is_dead, ours))
    for process in [{"pid": running.pid}, *ours] if hung else []:
        with suppress(ProcessLookupError):
            os.kill(process["pid"], signal.SIGKILL)
    said = [line for line in log.read_text().splitlines() if line.startswith("gsem: ") and "warning" not in line]
    # (Processes that have finished their work do not need the launcher any more.)
    finished = running.poll() == 0 or "\nsaved" in log.read_text()
    messages = len(said) == 1 or (finished and not said)
    if kind == "training" and (folder / name / "checkpoints/last.safetensors").exists():
        words = ["train", "--resume", name]
    run(words, o, folder / f"resumed-{number}")
    same = equal(arrays(folder, kind), arrays(folder, name))
    verdict = "ok" if messages and same and not hung else "WRONG"
    print(
        f"{number:>2} {kind:<10} {what:<12} after {moment:5.1f} s: ended in {took:4.1f} s, "
        f"{'equal' if same else 'DIFFERENT'}, {verdict}: {' | '.join(said) or '(no message)'}",
        flush=True,
    )
    return verdict == "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="start by torchrun instead of --processes")
    o = parser.parse_args()
    chance = random.Random(o.seed)
    with TemporaryDirectory() as place:
        folder = Path(place)
        seconds = {"training": run([*TRAIN, "--out", "training"], o, folder / "log")}
        (folder / "trained").symlink_to(folder / "training")
        seconds["evaluation"] = run([*EVALUATE, "--out", "evaluation"], o, folder / "log")
        print(", ".join(f"undisturbed {kind} {passed:.0f} s" for kind, passed in seconds.items()), flush=True)
        good = [kill_once(number, seconds, o, folder, chance) for number in range(o.kills)]
    print(f"{sum(good)} of {len(good)} as they must be")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
