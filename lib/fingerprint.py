"""The SHA-256 of PCam's files: by it a run names its data."""

import contextlib
import os

from lib.files import cache_folder, file_digest, read_cache, write_json
from lib.pcam import require_file, split_path


def fingerprint(directory, splits=("train", "valid")) -> dict[str, str]:
    """SHA-256 of each x and y file, {file name: hex}.

    The digests are stored in the user's cache, where it can be written, so that 7 GB are hashed
    once.
    """
    store = cache_folder() / f"{os.path.realpath(directory)}.json".replace("/", "%")
    digests = read_cache(store)
    fingerprints = {}
    for split in splits:
        for part in "xy":
            path = require_file(split_path(directory, split, part))
            status = path.stat()
            key = f"{path.name} {status.st_size} {status.st_mtime_ns}"
            if key not in digests:
                digests[key] = file_digest(path)
                with contextlib.suppress(OSError):
                    store.parent.mkdir(parents=True, exist_ok=True)
                    write_json(store, digests)
            fingerprints[path.name] = digests[key]
    return fingerprints
