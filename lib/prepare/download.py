"""The official files over HTTP: a cut transfer goes on where it ended, and nothing gets its name
before its MD5 is right.
"""

import gzip
import http.client
import shutil
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from lib.command import BadInput, one_line, say
from lib.files import atomic_write, file_digest, require_space
from lib.pcam import PATCH_BYTES, split_path
from lib.progress import Progress
from lib.published import OFFICIAL
from lib.splitwriter import sole_writer

ZENODO = "https://zenodo.org/records/2546921/files/NAME?download=1"
USER_AGENT = "pcam-pipeline/0.1"  # Zenodo refuses the one of Python
NUM_TRIES = 6
TIMEOUT_S = 30.0  # without a byte
MAX_WAIT_S, MAX_ASKED_WAIT_S = 60.0, 900.0
BLOCK_BYTES = 1 << 22
# about the bytes of a row; small files first: a wrong server shows at once
ROW_BYTES = {"meta": 80, "y": 1, "x": PATCH_BYTES}


class Cut(Exception):
    """A transfer ended early or could not begin; another try may get further. Its arguments: why,
    and the seconds to wait that the server asks for, or 0.
    """


class Wanted(NamedTuple):
    """A file to fetch: its official path, the name and MD5 that it is published with, and about its
    size unpacked. It is packed where its name ends in .gz.
    """

    path: Path
    name: str
    md5: str
    num_bytes: int


def download(
    directory, base_url=ZENODO, splits=tuple(OFFICIAL), official=None, timeout_s=None
) -> list[str]:
    """Bring the published files of `splits` into a folder, unpacked; gives the names of those that
    were fetched. A packed file that is there already, fetched by hand, is unpacked.

    `base_url` holds NAME in place of a file's name, or is a folder. Raises BadInput for a server
    that cannot be used or sends other files, a disk too small, or another file under an official
    name. `official` takes the place of the published rows and MD5, and `timeout_s` of TIMEOUT_S.
    """
    directory = Path(directory)
    url = base_url if "NAME" in base_url else f"{base_url.rstrip('/')}/NAME"
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"the base URL is {base_url}, it must begin with http:// or https://")
    with sole_writer(directory):
        files = []
        for split in splits:
            files += list_wanted(directory, split, (official or OFFICIAL)[split])
        for leftover in directory.glob(".*.tmp"):  # of a killed download
            leftover.unlink()
        sizes = [file.num_bytes for file in files]
        # all unpacked, the largest packed beside, without what a killed download has brought
        begun = sum(path.stat().st_size for path in directory.glob("*.part"))
        require_space(directory, sum(sizes) + max(sizes, default=0) - begun)
        for file in files:
            bring(file, url.replace("NAME", file.name), timeout_s or TIMEOUT_S)
    return [file.path.name for file in files]


def list_wanted(directory: Path, split: str, published: dict) -> list[Wanted]:
    """The `published` files of a split that are not there. Raises BadInput for another one under
    its name.
    """
    files = []
    for part, row_bytes in ROW_BYTES.items():
        path = split_path(directory, split, part)
        name = path.name
        md5 = unpacked_md5 = published[part]
        if part != "meta":
            name = f"{path.name}.gz"
            md5, unpacked_md5 = published[part]
        if not path.exists():
            files.append(Wanted(path, name, md5, published["rows"] * row_bytes))
        elif file_digest(path, "md5") != unpacked_md5:
            raise BadInput(
                f"{path} is there and is not the published file; move it away, or choose another"
                " folder"
            )
    return files


def bring(file: Wanted, url: str, timeout_s: float) -> None:
    """Fetch a file, once more where its content is wrong, and give it its official name."""
    by_hand = file.path.with_name(file.name)
    part = file.path.with_name(f"{file.name}.part")
    for _ in range(2):
        if by_hand.exists():
            by_hand.rename(part)
        else:
            fetch(url, part, timeout_s)
        md5 = file_digest(part, "md5")
        if md5 == file.md5:
            break
        part.unlink()
        say(f"{file.name}: MD5 {md5} is not the published {file.md5}")
    else:
        raise BadInput(f"{file.name} from {url}, fetched twice: MD5 {md5} is not {file.md5}")
    if part.stem == file.path.name:
        part.rename(file.path)
        return
    say(f"unpack {file.name}")
    with atomic_write(file.path) as target, gzip.open(part) as unpacked:
        shutil.copyfileobj(unpacked, target, BLOCK_BYTES)
    part.unlink()


def fetch(url: str, part: Path, timeout_s: float) -> None:
    """Download into `part`, going on at its end. Raises BadInput after NUM_TRIES in a row that got
    no further.
    """
    furthest = num_failures = 0
    with Progress(0, part.stem, "bytes") as progress:
        while True:
            try:
                with open(part, "ab") as file:
                    for offset, total, block in stream(url, file.tell(), timeout_s):
                        if not offset:  # the server began at the start, whatever it was asked for
                            file.truncate(0)
                        file.write(block)
                        if total:
                            progress.total = progress.num_done + total - offset
                        progress.add(len(block))
                return
            except Cut as cut:
                why, asked_s = cut.args
            size = part.stat().st_size
            if size > furthest:
                furthest = size
                num_failures = 0
            wait_s = asked_s or min(MAX_WAIT_S, 2.0**num_failures)
            num_failures += 1
            if num_failures == NUM_TRIES:
                kept = f"{size:,} bytes are kept for the next run"
                raise BadInput(f"{url} cannot be fetched: {why}; {kept}")
            say(f"{part.name}: {why} at {size:,} bytes, going on in {wait_s:.0f} s")
            time.sleep(wait_s)


def stream(url: str, start: int, timeout_s: float):
    """Yield (offset, total, bytes) of a file from `start`, or from 0 where the server knows no
    ranges, until a Cut. `total` is 0 where the server does not say it. Raises BadInput for what
    another try cannot mend.
    """
    headers = {"User-Agent": USER_AGENT}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            offset = start if response.status == 206 else 0
            total = offset + (response.length or 0)
            # what has come; read() would lose it in a stall
            for block in iter(lambda: response.read1(BLOCK_BYTES), b""):
                yield offset, total, block
                offset += len(block)
            if response.length:  # what is still to come
                raise Cut("the connection was cut", 0)
    except (OSError, http.client.HTTPException) as error:
        why = one_line(error)
        code = getattr(error, "code", 500)  # what is no answer of the server may pass
        if code == 416:  # nothing beyond `start`: whole, or too long; its MD5 tells
            return
        if "CERTIFICATE_VERIFY_FAILED" in why:
            why = f"{why}; SSL_CERT_FILE=FILE names the certificates to trust"
            code = 400
        if code < 500 and code not in (408, 429):
            raise BadInput(
                f"{url} is refused ({why}): fetch it with a browser, put it into the folder of --to"
                " as it is, and run this again"
            ) from None
        wait = getattr(error, "headers", {}).get("Retry-After", "")
        raise Cut(why, min(MAX_ASKED_WAIT_S, float(wait)) if wait.isdecimal() else 0) from None
