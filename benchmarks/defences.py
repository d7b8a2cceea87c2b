"""The audit on known defences and on healthy controls: what is claimed of each, what is found, and the verdict.

    python benchmarks/defences.py --data digits [--seeds 0,1] [--only dct,meansparse] [--images 128] [--full]
    python benchmarks/defences.py --data PATH --seeds 0,1

Small networks are trained for the battery of tests/helpers/battery.py, whose parameters are drawn from the seeds and
whose expectations stand there. For each row: the accuracy of the network without the defence under AutoAttack (Square
with `--queries`); what an AutoAttack-style white box claims of the defended network; what the audit finds; the verdict;
the audit's time. Networks and finished rows are kept in --out, so that an interrupted run resumes; the table is written
there as table.json and table.md.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gsem

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from audited_models import streams
from battery import CASES, CONTROLS, Case, Setting, digits_setting, make


def setting_of(o: argparse.Namespace) -> Setting:
    networks = o.out / "networks"
    networks.mkdir(parents=True, exist_ok=True)
    if o.data == "digits":
        return digits_setting(o.images, networks)
    source = gsem.data.load(o.data, o.data_path)
    return Setting(
        source, o.images, eps=source.eps, robust_eps=source.eps, width=o.width, steps=o.steps, folder=networks
    )


def undefended(case: Case, queries: int) -> float:
    attack = f"autoattack:queries={queries}" + ("" if case.control else ":eot=1")
    result = gsem.evaluate(case.undefended, case.x, case.y, attack, eps=case.eps, draws=20, frozen=False)
    return result.expected("worst").mean


def row(name: str, seed: int, setting: Setting, o: argparse.Namespace) -> dict[str, Any]:
    """One row: the case is made, its network measured without the defence, and the defended one audited."""
    case = make(name, seed, setting)
    with streams(seed):
        without = undefended(case, o.queries)
        started, worked = time.perf_counter(), time.process_time()
        audit = gsem.audit(case.model, case.x, case.y, case.attacks, eps=case.eps, quick=not o.full)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
    claimed, found = (audit.metadata.get(key) for key in ("claimed", "found"))
    figures = (None if claimed is None else claimed["accuracy"], found["accuracy"])
    return {
        "name": name,
        "seed": seed,
        "parameters": case.parameters,
        "images": len(case.x),
        "eps": case.eps,
        "attacks": case.attacks,
        "clean": audit.metadata["clean"]["accuracy"],
        "undefended": without,
        "claimed": figures[0],
        "found": found,
        "bound": case.bound(without),
        "verdict": audit.verdict,
        "reason": audit.reason,
        "reached_by": audit.metadata.get("reached_by"),
        "layers": {c.name: layer for c in audit.checks if (layer := (c.details or {}).get("layer"))},
        "outcomes": {c.name: c.outcome for c in audit.checks if c.outcome != "pass"},
        "faults": case.faults(audit.verdict, figures[0], figures[1], without),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(worked, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: the defences, then the controls."""
    lines = [
        "| | drawn | clean | undefended | claimed | found | verdict | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        drawn = ", ".join(f"{key} {value}" for key, value in r["parameters"].items())
        low, high = r["found"]["low"], r["found"]["high"]
        found = f"{r['found']['accuracy']:.1%} ({100 * low:.1f} – {100 * high:.1f})"
        claimed = "–" if r["claimed"] is None else f"{r['claimed']:.1%}"
        verdict = r["verdict"] + (" (!)" if r["faults"] else "")
        cells = [f"{r['name']}, {r['seed']}", drawn, f"{r['clean']:.1%}", f"{r['undefended']:.1%}", claimed, found]
        lines.append("| " + " | ".join([*cells, verdict, f"{r['cpu_seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or images of about 32 × 32 pixels")
    parser.add_argument("--data-path")
    parser.add_argument("--seeds", default="0", help="with commas between them")
    parser.add_argument("--only", help="names of cases, with commas between them: " + ", ".join(CASES))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--width", type=int, default=16, help="of the networks; those of digits have 8 channels")
    parser.add_argument("--steps", type=int, default=600, help="of training; for digits always 250")
    parser.add_argument("--queries", type=int, default=1000, help="of Square, on the undefended networks")
    parser.add_argument("--full", action="store_true", help="the audit's long form")
    parser.add_argument("--out", type=Path, default=Path("runs/defences"))
    o = parser.parse_args(words)
    o.names = o.only.split(",") if o.only else list(CASES)
    for name in o.names:
        if name not in CASES:
            parser.error(f"case {name!r} is unknown: it is one of {', '.join(CASES)}")
    return o


def main(words: list[str] | None = None) -> None:
    o = arguments(words)
    setting = setting_of(o)
    folder = o.out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in map(int, o.seeds.split(",")):
        for name in o.names:
            path = folder / f"{name}-{seed}.json"
            if not path.exists():
                made = row(name, seed, setting, o)
                path.write_text(json.dumps(made, indent=2))
            rows.append(json.loads(path.read_text()))
            print(table(rows[-1:]).splitlines()[-1], *rows[-1]["faults"], flush=True)
    rows.sort(key=lambda r: (r["name"] in CONTROLS, r["seed"], list(CASES).index(r["name"])))
    metadata = {key: str(value) for key, value in vars(o).items()}
    metadata |= {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    (o.out / "table.json").write_text(json.dumps({"metadata": metadata, "rows": rows}, indent=2))
    (o.out / "table.md").write_text(table(rows) + "\n")
    print(f"written to {o.out / 'table.md'} and {o.out / 'table.json'}; seconds: processor time; (!): not as expected")


if __name__ == "__main__":
    main()
