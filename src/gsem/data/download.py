"""Published files: found in the data folder, else downloaded."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

ROOT = Path("dataset")  # where data sets lie by default

_TIMEOUT = (10, 60)  # seconds until a server must answer, and between two pieces of the file
_CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class Remote:
    """A published file and its checksum."""

    url: str
    md5: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


def obtain(remote: Remote, name: str, *, root: Path | None = None, folder: str | None = None) -> Path:
    """The path of the file, or of the `folder` that it unpacks to, in `root` or `root`/`name`.

    If it is in neither place, it is downloaded into `root`. The file gets its name only when it is complete and has the
    published checksum. The checksum of a file that is already there is not compared, since repacked copies exist.

    Args:
        remote: the file.
        name: the data set's name.
        root: a folder, created for a download. Default: "dataset".
        folder: the name of the unpacked folder, which is preferred to the file; None if the file is not an archive.

    Raises:
        NotADirectoryError: `root` is a file.
        FileNotFoundError: the file is not there and cannot be downloaded.
    """
    root = (ROOT if root is None else root).expanduser()
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, but root is the folder in which {remote.file} lies")
    for place in (root, root / name):
        if folder is not None and (place / folder).is_dir():
            return place / folder
        if (place / remote.file).is_file():
            return place / remote.file
    new = not root.exists()
    try:
        return _download(remote, root)
    # requests raises OSErrors, pooch a ValueError for another checksum; pooch itself may not be installed.
    except (OSError, ValueError, ImportError) as error:
        if new:
            with suppress(OSError):  # (it was not created, or is not empty)
                root.rmdir()
        either = f"{remote.file} nor its unpacked folder {folder}" if folder else remote.file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{name}: neither in {root} nor in {root / name} is {either}, and it cannot be downloaded: "
            f"get {remote.url} and put it into {root} ({reason})"
        ) from error


def _download(remote: Remote, root: Path) -> Path:
    import pooch  # here, since with requests it takes half a second

    with _Bar(remote.file) as bar:
        downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, timeout=_TIMEOUT)
        # pooch writes to a temporary name beside it, renamed once the checksum is right.
        pooch.retrieve(remote.url, f"md5:{remote.md5}", fname=remote.file, path=root, downloader=downloader)
    path = root / remote.file
    path.chmod(root.stat().st_mode & 0o666)  # temporary files are private: give the file the rights of its folder
    return path


class _Bar:
    """A bar on a terminal, in the form that pooch fills: `total`, `update`, `reset` and `close`."""

    def __init__(self, file: str):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(file, total=None)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    @property
    def total(self) -> float | None:
        return self._bar.tasks[0].total

    @total.setter
    def total(self, size: int) -> None:
        if size > 0:  # (0 where the server did not send the size)
            self._bar.update(self._task, total=size)

    def update(self, size: int) -> None:
        self._bar.update(self._task, advance=size)

    def reset(self) -> None:
        self._bar.update(self._task, completed=0)

    def close(self) -> None:
        self._bar.stop()
