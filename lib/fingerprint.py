"""The SHA-256 of PCam's files: by it a run names its data."""

import contextlib
import os
from pathlib import Path

from lib.files import cache_folder, file_digest, read_cache, write_json
from lib.pcam import require_file, split_path

FINGERPRINT_FILE = ".pcam-sha256.json"


def fingerprint(directory, splits=("train", "valid")) -> dict[str, str]:
    """SHA-256 of each x and y file, {file name: hex}.

    The digests are stored beside the data, or in the user's cache where that folder is read-only,
    so that 7 GB are hashed once.
    """
    store = Path(directory, FINGERPRINT_FILE)
    user_store = cache_folder() / f"{os.path.realpath(directory)}.json".replace("/", "%")
    digests = read_cache(user_store) | read_cache(store)
    fingerprints = {}
    for split in splits:
        for part in "xy":
            path = require_file(split_path(directory, split, part))
            status = path.stat()
            key = f"{path.name} {status.st_size} {status.st_mtime_ns}"
            if key not in digests:
                digests[key] = file_digest(path)
                save_digests(digests, store, user_store)
            fingerprints[path.name] = digests[key]
    return fingerprints


def save_digests(digests: dict[str, str], *stores: Path) -> None:
    """Write the digests into the first of `stores` that can be written."""
    for store in stores:
        with contextlib.suppress(OSError):
            store.parent.mkdir(parents=True, exist_ok=True)
            write_json(store, digests)
            return
