"""Download, against a server that cuts, stalls, truncates, corrupts, refuses or ignores ranges:
files come right or fail by name.
"""

import gzip
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, draw_patches, run_script

import lib.prepare.download
from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import SPLITS, split_path
from lib.prepare.download import WrongContent, download
from lib.splitwriter import SplitWriter

NUM = {"train": 12, "valid": 8, "test": 8}
X, Y = (split_path("", "train", part).name + ".gz" for part in ("x", "y"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{name: bytes} of a small data set as it is published, and its table of rows and MD5."""
    folder, files, official = tmp_path_factory.mktemp("published"), {}, {}
    for seed, (split, num) in enumerate(NUM.items()):
        slide = f"camelyon16_{'test' if split == 'test' else 'train'}_{seed:03}"
        with SplitWriter(folder, split, num) as writer:
            writer.add(*draw_patches(num, seed), [(0, 0, "True", "True", slide)] * num)
        meta = split_path(folder, split, "meta")
        files[meta.name] = meta.read_bytes()
        official[split] = {"rows": num, "meta": file_digest(meta, "md5")}
        for part in ("x", "y"):
            path = split_path(folder, split, part)
            packed = folder / f"{path.name}.gz"
            packed.write_bytes(gzip.compress(path.read_bytes(), 1))
            official[split][part] = (file_digest(packed, "md5"), file_digest(path, "md5"))
            files[packed.name] = packed.read_bytes()
    return files, official


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults[name]` are taken one a request, `asked` keeps (name, first byte) of
    each.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = dict(files), {}, []
        self.url = f"http://127.0.0.1:{self.server_port}/files/NAME?download=1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.split("/")[-1].partition("?")[0]
        fault = (server.faults.get(name) or [""]).pop(0)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        server.asked.append((name, start))
        data = server.files.get(name)
        if not self.headers["User-Agent"].startswith("pcam-pipeline/"):
            fault = "403"  # as Zenodo does
        if data is None or fault.isdigit():
            self.send_response(int(fault or 404))
            self.send_header("Retry-After", "7")
            self.end_headers()
            return
        if fault == "no ranges":
            start = 0
        if start and start >= len(data):
            self.send_error(416)
            return
        body = data[start:]
        if fault == "truncate":
            body = body[: len(body) // 2]
        if fault == "corrupt":
            body = body[:-40] + bytes([body[-40] ^ 1]) + body[-39:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("cut", "stall", "slow"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep({"cut": 0, "stall": 1, "slow": 30}[fault])
            return
        self.wfile.write(body)


@pytest.fixture
def server(published):
    server = Server(published[0])
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(server, published, tmp_path, monkeypatch):
    """Download from the server into tmp_path. Waits do not wait: `fetch.waits_s` lists them."""

    def fetch(**options):
        options = {"official": published[1], "timeout_s": 0.3} | options
        return download(tmp_path, server.url, **options)

    fetch.waits_s = []
    clock = SimpleNamespace(sleep=fetch.waits_s.append)
    monkeypatch.setattr(lib.prepare.download, "time", clock)
    return fetch


def assert_complete(target, official, splits=SPLITS):
    for split in splits:
        for part in ("x", "y", "meta"):
            sums = official[split][part]
            md5 = sums if part == "meta" else sums[1]
            assert file_digest(split_path(target, split, part), "md5") == md5
    assert not [path.name for path in target.iterdir() if path.suffix in (".part", ".gz", ".tmp")]


def test_the_files_come_unpacked_and_are_fetched_once(tmp_path, server, published, fetch):
    assert len(fetch()) == 9 and len(server.asked) == 9
    assert_complete(tmp_path, published[1])
    path = split_path(tmp_path, "valid", "y")
    path.unlink()
    assert fetch() == [path.name] and len(server.asked) == 10


FAULTS = {
    "cut": (["cut", "cut", ""], lambda size: [0, size // 2, size // 2 + (size + 1) // 2 // 2]),
    "stall": (["stall", ""], lambda size: [0, size // 2]),
    "truncate": (["truncate", ""], lambda _: [0, 0]),
    "corrupt": (["corrupt", ""], lambda _: [0, 0]),
    "no ranges": (["cut", "no ranges"], lambda size: [0, size // 2]),
    "server errors": (["503", "cut", "500", ""], lambda size: [0, 0, size // 2, size // 2]),
    "a corrupt rest": (["cut", "corrupt", ""], lambda size: [0, size // 2, 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transfer_outlives_the_fault_and_asks_only_for_what_is_missing(
    tmp_path, server, published, fetch, fault
):
    faults, starts = FAULTS[fault]
    server.faults[X] = list(faults)
    fetch()
    assert_complete(tmp_path, published[1])
    assert [start for name, start in server.asked if name == X] == starts(len(server.files[X]))


def test_a_server_that_asks_to_wait_is_waited_for_as_long_as_it_says(server, fetch):
    server.faults[X] = ["429", "cut"]
    fetch()
    assert fetch.waits_s == [7, 1]


def test_a_refusal_says_how_to_fetch_by_hand_and_takes_what_was_fetched_so(
    tmp_path, server, published, fetch
):
    server.faults[X] = ["403"] * 2
    with pytest.raises(BadInput, match="is refused .*403.* with a browser"):
        fetch()
    (tmp_path / X).write_bytes(server.files[X])
    fetch()
    assert_complete(tmp_path, published[1])
    assert server.faults[X] == ["403"] and fetch.waits_s == []


BEGUN = {
    "whole": (lambda data: data, lambda size: [size]),
    "too long": (lambda data: data + b"x", lambda size: [size + 1, 0]),
    "of another file": (lambda _: b"\0" * 5000, lambda _: [5000, 0]),
}


def test_a_server_with_an_unknown_certificate_is_refused_at_once_with_the_remedy(
    server, fetch, tmp_path
):
    """The Python of python.org on macOS knows no certificates before they are installed."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2 -keyout"
    subprocess.run([*command.split(), key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = server.url.replace("http:", "https:")
    with pytest.raises(BadInput, match="CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        fetch()
    assert fetch.waits_s == []


@pytest.mark.parametrize("begun", BEGUN)
def test_a_part_that_is_already_there_is_used_or_thrown_away(
    tmp_path, server, published, fetch, begun
):
    data, (content, starts) = server.files[X], BEGUN[begun]
    (tmp_path / f"{X}.part").write_bytes(content(data))
    fetch()
    assert_complete(tmp_path, published[1])
    assert [start for name, start in server.asked if name == X] == starts(len(data))


def test_a_file_that_is_wrong_twice_fails_by_name_and_leaves_nothing_of_it(
    tmp_path, server, published, fetch
):
    server.faults[X] = ["corrupt", "corrupt"]
    with pytest.raises(WrongContent, match=f"{X}.*fetched twice.*{published[1]['train']['x'][0]}"):
        fetch(splits=("train",))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [split_path("", "train", part).name for part in ("meta", "y")]


def test_what_cannot_work_is_refused_at_once_and_what_may_pass_after_some_tries(
    tmp_path, server, published, fetch
):
    del server.files[Y]
    with pytest.raises(BadInput, match="404"):
        fetch()
    assert [name for name, _ in server.asked].count(Y) == 1
    server.faults[X], server.files[Y] = ["cut"] + ["503"] * 6, published[0][Y]
    with pytest.raises(BadInput, match="503.* bytes are kept"):
        fetch()
    fetch()
    assert (X, len(server.files[X]) // 2) in server.asked[-8:]
    with pytest.raises(BadInput, match="refused"):
        download(tmp_path / "b", "http://127.0.0.1:1")
    with pytest.raises(BadInput, match="must begin with http"):
        download(tmp_path / "b", "file:///etc/NAME")


def test_a_file_of_someone_else_is_not_touched(tmp_path, server, fetch):
    mine = split_path(tmp_path, "valid", "x")
    mine.write_bytes(b"mine")
    with pytest.raises(BadInput, match="valid_x.h5 is there and is not the published file"):
        fetch()
    assert mine.read_bytes() == b"mine" and server.asked == []


@pytest.fixture
def command(tmp_path, server, published):
    (tmp_path / "sums.json").write_text(json.dumps(published[1]))
    command = ["download", "--to", tmp_path / "out", "--base-url", server.url]
    return [*command, "--checksums", tmp_path / "sums.json"]


def test_a_killed_download_goes_on(tmp_path, server, published, command):
    server.faults[X], half = ["slow"], len(server.files[X]) // 2
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "prepare.py"), *map(str, command)],
        stderr=subprocess.DEVNULL,
    )
    part = tmp_path / "out" / f"{X}.part"
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not split_path(tmp_path / "out", "train", "x").exists() and part.stat().st_size <= half
    result = run_script("prepare.py", *command, check=0)
    assert_complete(tmp_path / "out", published[1])
    assert 0 < [start for name, start in server.asked if name == X][-1] <= half
    splits = result.json["splits"].values()
    assert [row["slide_names"] for row in splits] == ["match"] * 3
    assert len(result.json["fetched"]) == 7


def test_a_server_that_mends_the_table_by_renaming_the_files_is_found_out(
    tmp_path, server, published, command
):
    files, official = published
    for name in files:
        if "valid" in name:
            other = name.replace("valid", "test")
            server.files[name], server.files[other] = files[other], files[name]
    exchanged = official | {"valid": official["test"], "test": official["valid"]}
    (tmp_path / "sums.json").write_text(json.dumps(exchanged))
    result = run_script("prepare.py", *command, check=1)
    assert len(result.json["findings"]) == 2
    assert "finding: valid: its slides are not camelyon16_train_" in result.stderr
