"""Download, against a server that cuts, stalls, truncates, corrupts, refuses or ignores ranges:
files come right or fail by name.
"""

import gzip
import re
import ssl
import threading
import time
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import draw_patches

import lib.prepare.download
from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import split_path
from lib.prepare.download import download
from lib.published import compare_md5
from lib.splitwriter import SplitWriter

X = split_path("", "train", "x").name + ".gz"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{name: bytes} of a small data set as it is published, and its table of rows and MD5."""
    folder = tmp_path_factory.mktemp("published")
    files = {}
    official = {}
    for split, slide in (("train", "camelyon16_train_001"), ("test", "camelyon16_test_001")):
        with SplitWriter(folder, split, 8) as writer:
            writer.add(*draw_patches(8, len(slide)), [(0, 0, "True", "True", slide)] * 8)
        official[split] = {"rows": 8}
        for part in ("x", "y"):
            path = split_path(folder, split, part)
            packed = path.with_name(f"{path.name}.gz")
            packed.write_bytes(gzip.compress(path.read_bytes(), 1))
            files[packed.name] = packed.read_bytes()
            official[split][part] = (file_digest(packed, "md5"), file_digest(path, "md5"))
        path = split_path(folder, split, "meta")
        files[path.name] = path.read_bytes()
        official[split]["meta"] = file_digest(path, "md5")
    return files, official


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        name = self.path.split("/")[-1].partition("?")[0]
        fault = (server.faults.get(name) or [""]).pop(0)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        data = server.files[name]
        server.asked.append((name, start / len(data)))
        if not self.headers["User-Agent"].startswith("pcam-pipeline/"):
            fault = "403"  # as Zenodo does
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Retry-After", "7")
            self.end_headers()
            return
        if fault == "no ranges":
            start = 0
        if start and start >= len(data):
            self.send_error(416)
            return
        body = data[start:]
        if fault == "corrupt":
            body = body[:-40] + bytes([body[-40] ^ 1]) + body[-39:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("cut", "stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if fault == "stall":
            time.sleep(1)


@pytest.fixture
def server(published, monkeypatch):
    """Serves `files`; `faults[name]` are taken one a request, `asked` keeps (name, where the request
    began, as a share of the file) of each. Waits do not wait: `waits_s` lists them.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = dict(published[0])
    server.faults = {}
    server.asked = []
    server.waits_s = []
    server.url = f"http://127.0.0.1:{server.server_port}/files/NAME?download=1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    clock = SimpleNamespace(sleep=server.waits_s.append)
    monkeypatch.setattr(lib.prepare.download, "time", clock)
    monkeypatch.setattr(lib.prepare.download, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(lib.prepare.download, "OFFICIAL", published[1])
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(server, published, tmp_path):
    """Download from the server into tmp_path, and check what has come."""

    def fetch():
        names = download(tmp_path, server.url, published[1])
        for split in published[1]:
            assert compare_md5(tmp_path, split, published[1]) == []
        assert len(list(tmp_path.iterdir())) == 6
        return names

    return fetch


def test_the_files_come_unpacked_and_are_fetched_once(tmp_path, server, fetch):
    assert len(fetch()) == len(server.asked) == 6
    path = split_path(tmp_path, "test", "x")
    path.unlink()
    assert fetch() == [path.name] and len(server.asked) == 7
    path.write_bytes(b"mine")
    with pytest.raises(BadInput, match="test_x.h5 is there and is not the published file"):
        fetch()
    assert path.read_bytes() == b"mine" and len(server.asked) == 7


# what goes wrong in the requests for a file, and where they start
FAULTS = {
    "cut": (["cut", "cut", ""], [0, 1 / 2, 3 / 4]),
    "stall": (["stall", ""], [0, 1 / 2]),
    "no ranges": (["cut", "no ranges"], [0, 1 / 2]),
    "server errors": (["503", "cut", "500", ""], [0, 0, 1 / 2, 1 / 2]),
    "a corrupt rest": (["cut", "corrupt", ""], [0, 1 / 2, 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_asks_only_for_what_a_fault_left_missing(server, fetch, fault):
    faults, starts = FAULTS[fault]
    server.faults[X] = list(faults)
    fetch()
    assert [start for name, start in server.asked if name == X] == pytest.approx(starts, abs=1e-3)


def test_a_server_that_asks_to_wait_is_waited_for_as_long_as_it_says(server, fetch):
    server.faults[X] = ["429", "cut"]
    fetch()
    assert server.waits_s == [7, 1]


def test_a_refusal_says_how_to_fetch_by_hand_and_takes_what_was_fetched_so(tmp_path, server, fetch):
    server.faults[X] = ["403"] * 2
    with pytest.raises(BadInput, match="is refused .*403.* with a browser"):
        fetch()
    (tmp_path / X).write_bytes(server.files[X])
    fetch()
    assert server.faults[X] == ["403"] and server.waits_s == []


def test_an_unknown_certificate_is_refused_at_once_with_the_remedy(server, fetch, monkeypatch):
    """The Python of python.org on macOS knows no certificates before they are installed."""

    def refuse(*_, **_options):
        error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] unable to get")
        raise urllib.error.URLError(error)

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(BadInput, match="CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        fetch()
    assert server.waits_s == []


def test_what_does_not_come_right_fails_by_name_and_leaves_nothing_wrong(
    tmp_path, server, published, fetch
):
    server.faults[X] = ["corrupt", "corrupt"]
    with pytest.raises(BadInput, match=f"{X}.*fetched twice.*{published[1]['train']['x'][0]}"):
        fetch()
    assert len(list(tmp_path.iterdir())) == 2
    server.faults[X] = ["cut"] + ["503"] * 6
    with pytest.raises(BadInput, match="503.* bytes are kept"):
        fetch()
    fetch()
    with pytest.raises(BadInput, match="must begin with http"):
        download(tmp_path / "b", "file:///etc/NAME")
