"""Run every command of the tutorials again, and write what it prints, the date and the version into the pages.

    python docs/run_tutorials.py [PAGE ...]

PAGE: names of pages in docs/tutorials, without .md; default: all. In a page, a block ```console holds commands, `$ …`,
and behind each what it printed. The commands of a page run one after the other in an empty folder with a copy of
examples/. The line that begins with *Last run* gets the date and the versions.
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gsem

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.S | re.M)
LAST_RUN = re.compile(r"^\*Last run: .*\*$", re.M)


def commands(block: str) -> list[str]:
    r"""The commands of a block, without `$ `. A line that ends with a backslash continues in the next one."""
    return re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.M)


def run(command: str, folder: Path) -> str:
    """What the command prints, on standard output and error.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "80",
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        command, shell=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if ran.returncode:
        raise RuntimeError(f"{command} ended with code {ran.returncode}:\n{ran.stdout}")
    return "".join(f"{line.rstrip()}\n" for line in ran.stdout.strip("\n").splitlines())


def rerun(text: str, today: str) -> str:
    """The page with the output of its commands today."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (ROOT / "examples").glob("*.py"):
            shutil.copy(file, folder)

        def again(block: re.Match) -> str:
            shown = "".join(f"$ {command}\n{run(command, Path(folder))}" for command in commands(block[1]))
            return f"```console\n{shown}```"

        text = BLOCK.sub(again, text)
    return LAST_RUN.sub(f"*Last run: {today}.*", text)


def main() -> None:
    names = sys.argv[1:] or [page.stem for page in sorted(PAGES.glob("*.md"))]
    torch = subprocess.check_output([sys.executable, "-c", "import torch; print(torch.__version__)"], text=True).strip()
    now = datetime.date.today()
    today = f"{now.day} {now:%B %Y}, gsem {gsem.__version__}, torch {torch}, one thread of a CPU"
    for name in names:
        page = PAGES / f"{name}.md"
        page.write_text(rerun(page.read_text(), today))
        print(f"{page.relative_to(ROOT)}: run")


if __name__ == "__main__":
    main()
