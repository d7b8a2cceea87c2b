import hashlib
import http.server
import logging
import os
import threading

import pytest

from gsem.data import download
from gsem.data.download import Remote, obtain

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server():
    """Serves CONTENT at /whole.bin, breaks off in the middle of it at /cut.bin; nothing beyond this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/none.bin":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if self.path == "/whole.bin" else CONTENT[: len(CONTENT) // 2])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    logging.getLogger("pooch").setLevel(logging.WARNING)


def remote(server, file="whole.bin", content=CONTENT):
    return Remote(f"{server}/{file}", hashlib.md5(content).hexdigest())


def test_a_download_is_whole_named_and_readable(tmp_path, server):
    root = tmp_path / "a" / "dataset"
    path = obtain(remote(server), "made", root=root)
    assert path == root / "whole.bin"
    assert path.read_bytes() == CONTENT
    assert os.listdir(root) == ["whole.bin"]
    assert path.stat().st_mode & 0o777 == root.stat().st_mode & 0o666
    path.write_bytes(b"repacked")
    obtain(remote(server), "made", root=root)
    assert path.read_bytes() == b"repacked"  # what is found is not downloaded again


@pytest.mark.parametrize(
    ("file", "content"),
    [("cut.bin", CONTENT), ("cut.bin", CONTENT[:128000]), ("whole.bin", b"other"), ("none.bin", CONTENT)],
    ids=["broken off", "broken off, checksum of the half", "another checksum", "not found"],
)
def test_what_is_not_whole_is_not_kept(tmp_path, server, file, content):
    with pytest.raises(FileNotFoundError, match=f"made: neither in .*get {server}/{file} and put it into"):
        obtain(remote(server, file, content), "made", root=tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, server, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Bar, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        obtain(remote(server), "made", root=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_is_not_there_is_named_in_one_line(tmp_path):
    root = tmp_path / "new"
    with pytest.raises(FileNotFoundError) as raised:
        obtain(Remote("http://127.0.0.1:9/x.tar.gz", "0" * 32), "made", root=root, folder="x-py")
    assert not root.exists()
    message = str(raised.value)
    assert "\n" not in message
    for part in (str(tmp_path), "x.tar.gz", "x-py", "http://127.0.0.1:9/x.tar.gz"):
        assert part in message


NO_POOCH = ModuleNotFoundError("No module named 'pooch'")


@pytest.mark.parametrize("error", [OSError("no network"), PermissionError("read\nonly"), OSError(), NO_POOCH])
def test_any_failure_is_one_clear_error(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(download, "_download", fail)
    with pytest.raises(FileNotFoundError, match=r"get http://there/x\.mat and put it into .*\(.+\)$") as raised:
        obtain(Remote("http://there/x.mat", ""), "made", root=tmp_path)
    assert "\n" not in str(raised.value)


def test_files_are_found_in_order_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("a download"))
    x = Remote("http://there/x.tar.gz", "")
    places = [tmp_path / "made" / "x.tar.gz", tmp_path / "made" / "x-py", tmp_path / "x.tar.gz", tmp_path / "x-py"]
    for place in places:  # each is preferred to those before it
        place.mkdir(parents=True) if place.suffix != ".gz" else (
            place.parent.mkdir(exist_ok=True),
            place.write_bytes(b""),
        )
        assert obtain(x, "made", root=tmp_path, folder="x-py") == place
    assert obtain(x, "made", root=tmp_path) == tmp_path / "x.tar.gz"


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"x\.tar\.gz is a file, but root is the folder"):
        obtain(Remote("http://there/x.tar.gz", ""), "made", root=tmp_path / "x.tar.gz")


def test_the_bar_is_what_pooch_fills():
    with download._Bar("x") as bar:
        assert bar.total is None and bar
        bar.total = 100
        assert bar.total == 100
        bar.update(30)
        bar.update(30)
        assert bar._bar.tasks[0].completed == 60
        bar.reset()
        assert bar._bar.tasks[0].completed == 0
        bar.close()
    with download._Bar("x") as bar:
        bar.total = 0  # a server that does not send it
        assert bar.total is None
