"""The package's version, and the git commit where it runs from a checkout."""

import subprocess
from pathlib import Path

import gsem


def release() -> str:
    """The version of this package, also where it runs from a folder and is not installed."""
    return gsem.__version__


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that `folder` is tracked in, with `-dirty` behind it where tracked files differ.

    None outside of a checkout (also for a package installed inside somebody else's), or without git.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", ".")
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        return found + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    ran = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10, check=True)
    return ran.stdout.strip()
