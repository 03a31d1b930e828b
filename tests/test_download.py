"""Download, against a server that cuts, stalls, truncates, corrupts, refuses or ignores ranges:
files come right or fail by name.
"""

import gzip
import json
import re
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import draw_patches

import lib.prepare.download
import prepare
from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import split_path
from lib.prepare.download import WrongContent, download
from lib.published import compare_md5
from lib.splitwriter import SplitWriter

X, Y = (split_path("", "train", part).name + ".gz" for part in ("x", "y"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{name: bytes} of a small data set as it is published, and its table of rows and MD5."""
    folder, files, official = tmp_path_factory.mktemp("published"), {}, {}
    for split, slide in (("train", "camelyon16_train_001"), ("test", "camelyon16_test_001")):
        with SplitWriter(folder, split, 8) as writer:
            writer.add(*draw_patches(8, len(slide)), [(0, 0, "True", "True", slide)] * 8)
        official[split] = {"rows": 8}
        for part in ("x", "y", "meta"):
            path = split_path(folder, split, part)
            name, data, md5 = path.name, path.read_bytes(), file_digest(path, "md5")
            if part != "meta":
                name, data = f"{name}.gz", gzip.compress(data, 1)
                (folder / name).write_bytes(data)
                md5 = (file_digest(folder / name, "md5"), md5)
            official[split][part], files[name] = md5, data
    return files, official


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.split("/")[-1].partition("?")[0]
        fault = (server.faults.get(name) or [""]).pop(0)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        data = server.files.get(name)
        server.asked.append((name, start))
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
def server(published):
    """Serves `files`; `faults[name]` are taken one a request, `asked` keeps (name, first byte) of
    each.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.asked = dict(published[0]), {}, []
    server.url = f"http://127.0.0.1:{server.server_port}/files/NAME?download=1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(server, published, tmp_path, monkeypatch):
    """Download from the server into tmp_path. Waits do not wait: `fetch.waits_s` lists them."""

    def fetch():
        splits = tuple(published[1])
        return download(tmp_path, server.url, splits, published[1], timeout_s=0.3)

    fetch.waits_s = []
    clock = SimpleNamespace(sleep=fetch.waits_s.append)
    monkeypatch.setattr(lib.prepare.download, "time", clock)
    return fetch


def require_complete(target, official):
    for split in official:
        assert compare_md5(target, split, official) == []
    assert len(list(target.glob("camelyonpatch_*"))) == 6


def shares_asked(server) -> list[float]:
    """Where the requests for X began, as shares of its size."""
    return [start / len(server.files[X]) for name, start in server.asked if name == X]


def test_the_files_come_unpacked_and_are_fetched_once(tmp_path, server, published, fetch):
    assert len(fetch()) == len(server.asked) == 6
    require_complete(tmp_path, published[1])
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
def test_every_request_asks_only_for_what_a_fault_left_missing(
    tmp_path, server, published, fetch, fault
):
    faults, starts = FAULTS[fault]
    server.faults[X] = list(faults)
    fetch()
    require_complete(tmp_path, published[1])
    assert shares_asked(server) == pytest.approx(starts, abs=1e-3)


@pytest.mark.parametrize(("more", "starts"), [(b"", [1]), (b"x", [1, 0])])
def test_a_part_that_is_whole_is_used_and_one_that_is_too_long_is_not(
    tmp_path, server, published, fetch, more, starts
):
    (tmp_path / f"{X}.part").write_bytes(server.files[X] + more)
    fetch()
    require_complete(tmp_path, published[1])
    assert shares_asked(server) == pytest.approx(starts, abs=1e-3)


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
    require_complete(tmp_path, published[1])
    assert server.faults[X] == ["403"] and fetch.waits_s == []


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


def test_a_file_that_is_wrong_twice_fails_by_name_and_leaves_nothing_of_it(
    tmp_path, server, published, fetch
):
    server.faults[X] = ["corrupt", "corrupt"]
    with pytest.raises(WrongContent, match=f"{X}.*fetched twice.*{published[1]['train']['x'][0]}"):
        fetch()
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
    assert shares_asked(server)[-1] == pytest.approx(1 / 2, abs=1e-3)
    with pytest.raises(BadInput, match="must begin with http"):
        download(tmp_path / "b", "file:///etc/NAME")


def test_a_server_that_mends_the_table_by_renaming_the_files_is_found_out(
    tmp_path, server, published, capsys
):
    def run(name, official):
        sums = tmp_path / f"{name}.json"
        sums.write_text(json.dumps(official))
        options = ["--base-url", server.url, "--checksums", str(sums), "--splits", "train,test"]
        code = prepare.main(["download", "--to", str(tmp_path / name), *options])
        output = capsys.readouterr()
        return code, json.loads(output.out), output.err

    files, official = published
    code, result, _ = run("out", official)
    assert code == 0 and len(result["fetched"]) == 6
    assert [row["slide_names"] for row in result["splits"].values()] == ["match"] * 2
    for name in files:
        if "train" in name:
            other = name.replace("train", "test")
            server.files[name], server.files[other] = files[other], files[name]
    code, result, stderr = run("exchanged", {"train": official["test"], "test": official["train"]})
    assert code == 1 and len(result["findings"]) == 2
    assert "finding: train: its slides are not camelyon16_train_" in stderr
