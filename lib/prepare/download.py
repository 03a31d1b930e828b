"""The official files over HTTP: a cut transfer goes on where it ended, and nothing gets its name
before its MD5 is right.
"""

import gzip
import hashlib
import http.client
import time
import urllib.request
import zlib
from pathlib import Path

from lib.command import BadInput, one_line, say
from lib.files import atomic_write, file_digest, require_space
from lib.pcam import PATCH_BYTES, sole_writer, split_path
from lib.progress import Progress
from lib.published import OFFICIAL

ZENODO = "https://zenodo.org/records/2546921/files/NAME?download=1"
NUM_TRIES, LONGEST_WAIT_S = 6, 60.0
BLOCK_BYTES = 1 << 22


class WrongContent(Exception):
    """A file arrived whole, twice, and is not the published one."""


class Cut(Exception):
    """A transfer ended early or could not begin; another try may get further."""


def download(
    directory,
    base_url=ZENODO,
    splits=tuple(OFFICIAL),
    official=OFFICIAL,
    timeout_s=30.0,
    backoff_s=1.0,
) -> list[str]:
    """Bring the published files of `splits` into a folder, unpacked; gives the names of those that
    were fetched.

    `base_url` holds NAME in place of a file's name, or is a folder. Raises BadInput for a server
    that cannot be used, a disk too small, or another file under an official name; WrongContent
    after an MD5 mismatch in two fetches.
    """
    directory, wanted = Path(directory), []
    url = base_url if "NAME" in base_url else f"{base_url.rstrip('/')}/NAME"
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"the base URL is {base_url}, it must begin with http:// or https://")
    for split in splits:
        # small files first: a wrong server shows at once
        for part, sizes in (("meta", 80), ("y", 1), ("x", PATCH_BYTES)):
            path, sums = split_path(directory, split, part), official[split][part]
            packed_md5, md5 = (None, sums) if part == "meta" else sums
            if not path.exists():
                wanted.append((path, packed_md5, md5, official[split]["rows"] * sizes))
            elif file_digest(path, "md5") != md5:
                raise BadInput(
                    f"{path} is there and is not the published file; move it away, or choose"
                    " another folder"
                )
    with sole_writer(directory):
        # of a killed run; a begun .part goes on
        for stale in directory.glob(".camelyonpatch_*.tmp"):
            stale.unlink()
        begun = sum(part.stat().st_size for part in directory.glob("camelyonpatch_*.part"))
        sizes = [size for *_, size in wanted]
        # all unpacked, the largest packed beside
        require_space(directory, max(0, sum(sizes) + max(sizes, default=0) - begun))
        for path, packed_md5, md5, _ in wanted:
            name = path.name + (".gz" if packed_md5 else "")
            part = directory / f"{name}.part"
            for attempt in (1, 2):
                fetch(url.replace("NAME", name), part, timeout_s, backoff_s)
                wrong = place(part, path, packed_md5, md5)
                part.unlink(missing_ok=True)
                if not wrong:
                    break
                say(f"{name}: {wrong}" + (", fetching it once more" if attempt == 1 else ""))
            else:
                raise WrongContent(
                    f"{name} from {url.replace('NAME', name)}, fetched twice: {wrong}"
                )
    return [path.name for path, *_ in wanted]


def place(part: Path, path: Path, packed_md5: str | None, md5: str) -> str:
    """Give a whole transfer its official name, unpacked where it has a `packed_md5`. Gives what is
    wrong with it, or ''.
    """
    found = file_digest(part, "md5")
    if found != (packed_md5 or md5):
        return f"MD5 {found} is not the published {packed_md5 or md5}"
    if not packed_md5:
        part.rename(path)
        return ""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with (
            atomic_write(path) as file,
            gzip.open(part) as unpacked,
            Progress(0, f"unpack {path.name}", "bytes") as progress,
        ):
            while block := unpacked.read(BLOCK_BYTES):
                file.write(block)
                digest.update(block)
                progress.add(len(block))
            if digest.hexdigest() != md5:
                raise EOFError(f"MD5 {digest.hexdigest()} unpacked is not the published {md5}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return one_line(error)
    return ""


def fetch(url: str, part: Path, timeout_s: float, backoff_s: float) -> None:
    """Download into `part`, going on at its end. Raises BadInput after NUM_TRIES in a row that got
    no further.
    """
    furthest, failures = 0, 0
    with Progress(0, part.name.removesuffix(".part"), "bytes") as progress:
        while True:
            try:
                with open(part, "ab") as file:
                    for offset, total, block in stream(url, file.tell(), timeout_s):
                        if not offset:  # the server began at the start, whatever it was asked for
                            file.truncate(0)
                        file.write(block)
                        progress.total = progress.num_done + total - offset if total else 0
                        progress.add(len(block))
                return
            except Cut as cut:
                size = part.stat().st_size
                failures, furthest = (failures + 1, furthest) if size <= furthest else (1, size)
                if failures >= NUM_TRIES:
                    raise BadInput(
                        f"{url} cannot be fetched: {cut}; {size:,} bytes are kept for the next run"
                    ) from None
                wait_s = min(LONGEST_WAIT_S, backoff_s * 2 ** (failures - 1))
                say(f"{part.name}: {cut} at {size:,} bytes, going on in {wait_s:.0f} s")
                time.sleep(wait_s)


def stream(url: str, start: int, timeout_s: float):
    """Yield (offset, total or None, bytes) of a file from `start`, or from 0 where the server knows
    no ranges, until a Cut.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            offset = start if response.status == 206 else 0
            if offset and not response.headers.get("Content-Range", "").startswith(
                f"bytes {start}-"
            ):
                raise Cut("the server sent another range than was asked for")
            total = offset + response.length if response.length is not None else None
            # what has come; read() would lose it in a stall
            while block := response.read1(BLOCK_BYTES):
                yield offset, total, block
                offset += len(block)
            if total is not None and offset < total:
                raise Cut("the connection was cut")
    except (OSError, http.client.HTTPException) as error:
        code = getattr(error, "code", 500)  # what is no answer of the server may pass
        if code < 500 and code not in (408, 416, 429):
            raise BadInput(f"{url} is refused by the server: {one_line(error)}") from None
        if code != 416:  # nothing beyond `start`: whole, or too long; its MD5 tells
            raise Cut(one_line(error)) from None
