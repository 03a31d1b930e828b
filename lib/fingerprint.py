"""The SHA-256 of PCam's files: by it a run names its data."""

import itertools
from pathlib import Path

from lib.files import cache_file, file_digest, read_cache, write_cache
from lib.pcam import require_file, split_path

FINGERPRINT_FILE = ".pcam-sha256.json"


def fingerprint(directory, splits=("train", "valid")) -> dict[str, str]:
    """SHA-256 of each x and y file, {file name: hex}.

    The digests are stored beside the data, or in the user's cache where that folder is read-only,
    so that 7 GB are hashed once.
    """
    store = Path(directory, FINGERPRINT_FILE)
    user_store = cache_file(store)
    digests = read_cache(user_store) | read_cache(store)
    fingerprints = {}
    for split, part in itertools.product(splits, "xy"):
        path = require_file(split_path(directory, split, part))
        status = path.stat()
        key = f"{path.name} {status.st_size} {status.st_mtime_ns}"
        if key not in digests:
            digests[key] = file_digest(path)
            is_stored = write_cache(store, digests)
            if not is_stored:
                write_cache(user_store, digests)
        fingerprints[path.name] = digests[key]
    return fingerprints
