"""Download, against a server that cuts, stalls, truncates, corrupts or ignores ranges: files come
right or fail by name.
"""

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import REPOSITORY, draw_patches, run_script

import lib.files
from lib.command import BadInput
from lib.files import file_digest
from lib.pcam import SPLITS, SplitWriter, split_path
from lib.prepare.download import WrongContent, download

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
        official[split] = {
            "rows": num,
            "meta": file_digest(split_path(folder, split, "meta"), "md5"),
        }
        files[split_path("", split, "meta").name] = split_path(folder, split, "meta").read_bytes()
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
        if data is None or fault.isdigit():
            self.send_error(int(fault or 404))
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
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
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


def fetch(server, published, target, **options):
    return download(
        target,
        server.url,
        **({"official": published[1], "timeout_s": 0.3, "backoff_s": 0.01} | options),
    )


def assert_complete(target, official, splits=SPLITS):
    for split in splits:
        for part in ("x", "y", "meta"):
            sums = official[split][part]
            assert file_digest(split_path(target, split, part), "md5") == (
                sums if part == "meta" else sums[1]
            )
    assert not [path.name for path in target.iterdir() if path.suffix in (".part", ".gz", ".tmp")]


def test_the_files_come_unpacked_and_are_fetched_once(tmp_path, server, published):
    assert len(fetch(server, published, tmp_path)) == 9 and len(server.asked) == 9
    assert_complete(tmp_path, published[1])
    split_path(tmp_path, "valid", "y").unlink()
    assert (
        fetch(server, published, tmp_path) == [split_path("", "valid", "y").name]
        and len(server.asked) == 10
    )


FAULTS = {
    "cut": (["cut", "cut", ""], lambda size: [0, size // 2, size // 2 + (size + 1) // 2 // 2]),
    "stall": (["stall", ""], lambda size: [0, size // 2]),
    "truncate": (["truncate", ""], lambda _: [0, 0]),
    "corrupt": (["corrupt", ""], lambda _: [0, 0]),
    "no ranges": (["cut", "no ranges"], lambda size: [0, size // 2]),
    "server errors": (
        ["503", "429", "cut", "500", ""],
        lambda size: [0, 0, 0, size // 2, size // 2],
    ),
    "a corrupt rest": (["cut", "corrupt", ""], lambda size: [0, size // 2, 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transfer_outlives_the_fault_and_asks_only_for_what_is_missing(
    tmp_path, server, published, fault
):
    server.faults[X], starts = list(FAULTS[fault][0]), FAULTS[fault][1]
    fetch(server, published, tmp_path)
    assert_complete(tmp_path, published[1])
    assert [start for name, start in server.asked if name == X] == starts(len(server.files[X]))


@pytest.mark.parametrize("begun", ["whole", "too long", "of another file"])
def test_a_part_that_is_already_there_is_used_or_thrown_away(tmp_path, server, published, begun):
    data = server.files[X]
    (tmp_path / f"{X}.part").write_bytes(
        {"whole": data, "too long": data + b"x", "of another file": b"\0" * 5000}[begun]
    )
    fetch(server, published, tmp_path)
    assert_complete(tmp_path, published[1])
    starts = {"whole": [len(data)], "too long": [len(data) + 1, 0], "of another file": [5000, 0]}[
        begun
    ]
    assert [start for name, start in server.asked if name == X] == starts


def test_a_file_that_is_wrong_twice_fails_by_name_and_leaves_nothing_of_it(
    tmp_path, server, published
):
    server.faults[X] = ["corrupt", "corrupt"]
    with pytest.raises(WrongContent, match=f"{X}.*fetched twice.*{published[1]['train']['x'][0]}"):
        fetch(server, published, tmp_path, splits=("train",))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        split_path("", "train", part).name for part in ("meta", "y")
    ]


def test_the_unpacked_sum_is_checked_too(tmp_path, server, published):
    official = {"train": published[1]["train"] | {"x": (published[1]["train"]["x"][0], "0" * 32)}}
    with pytest.raises(WrongContent, match="unpacked is not the published 0000"):
        fetch(server, published, tmp_path, splits=("train",), official=official)
    assert not split_path(tmp_path, "train", "x").exists() and not any(tmp_path.glob(".*"))


def test_what_cannot_work_is_refused_at_once_and_what_may_pass_after_some_tries(
    tmp_path, server, published
):
    del server.files[Y]
    with pytest.raises(BadInput, match="404"):
        fetch(server, published, tmp_path)
    assert [name for name, _ in server.asked].count(Y) == 1
    server.faults[X], server.files[Y] = ["cut"] + ["503"] * 6, published[0][Y]
    with pytest.raises(BadInput, match="503.* bytes are kept"):
        fetch(server, published, tmp_path)
    fetch(server, published, tmp_path)
    assert server.asked[-8:][0] == (X, len(server.files[X]) // 2)
    with pytest.raises(BadInput, match="refused"):
        download(tmp_path / "b", "http://127.0.0.1:1", backoff_s=0.001)
    with pytest.raises(BadInput, match="must begin with http"):
        download(tmp_path / "b", "file:///etc/NAME")


def test_the_disk_is_asked_first_and_a_file_of_someone_else_is_not_touched(
    tmp_path, server, published, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            lib.files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e6, 8e6, 1e6)
        )
        with pytest.raises(BadInput, match=r"1\.1 MB are needed and 1\.0 MB are free"):
            fetch(server, published, tmp_path)
    (mine := split_path(tmp_path, "valid", "x")).write_bytes(b"mine")
    with pytest.raises(BadInput, match="valid_x.h5 is there and is not the published file"):
        fetch(server, published, tmp_path)
    assert mine.read_bytes() == b"mine" and server.asked == []


def test_a_killed_download_goes_on_and_the_script_proves_the_splits(tmp_path, server, published):
    (table := tmp_path / "sums.json").write_text(json.dumps(published[1]))
    arguments = [
        "download",
        "--to",
        tmp_path / "out",
        "--base-url",
        server.url,
        "--checksums",
        table,
    ]
    server.faults[X], half = ["slow"], len(server.files[X]) // 2
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "prepare.py"), *map(str, arguments)],
        stderr=subprocess.DEVNULL,
    )
    part = tmp_path / "out" / f"{X}.part"
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not split_path(tmp_path / "out", "train", "x").exists() and part.stat().st_size <= half
    result = run_script("prepare.py", *arguments, check=0)
    assert_complete(tmp_path / "out", published[1])
    assert 0 < [start for name, start in server.asked if name == X][-1] <= half
    assert [row["slide_names"] for row in result.json["splits"].values()] == ["match"] * 3 and len(
        result.json["fetched"]
    ) == 7
    exchanged = published[1] | {"valid": published[1]["test"], "test": published[1]["valid"]}
    # a server that "mends" the table by renaming the files
    for name in [name for name in published[0] if "valid" in name]:
        other = name.replace("valid", "test")
        server.files[name], server.files[other] = published[0][other], published[0][name]
    table.write_text(json.dumps(exchanged))
    result = run_script("prepare.py", *arguments[:2], tmp_path / "swapped", *arguments[3:], check=1)
    assert (
        len(result.json["findings"]) == 2
        and "finding: valid: its slides are not camelyon16_train_" in result.stderr
    )
