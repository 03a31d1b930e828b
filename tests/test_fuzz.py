"""Files damaged at random, under one seed: inference.py refuses them in one sentence, or gives each
input a row and judges the good ones as if they were alone.
"""

import gzip
import random

import pytest
from conftest import draw_patches
from test_inference import infer
from test_inputs import encode, write_tar
from test_pcam import write_h5

PATCHES, _ = draw_patches(8, 9)
NUM_FILES = 8  # damaged ones of each kind


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes as they come from a bad disk or a cut transfer."""
    start, end = sorted(rng.choices(range(len(data)), k=2))
    middle = rng.choice((b"", bytes(end - start), rng.randbytes(end - start)))
    return data[:start] + middle + rng.choice((data[end:], b""))


@pytest.mark.slow
def test_damaged_files_are_refused_or_have_their_rows_and_harm_no_others(quick_run, tmp_path):
    members = [(f"{number}.png", encode(patch)) for number, patch in enumerate(PATCHES)]
    tar = write_tar(tmp_path / "whole.tar", members).read_bytes()
    whole = write_h5(tmp_path / "whole.h5", PATCHES)
    kinds = {kind: encode(PATCHES[0], kind) for kind in ("png", "jpeg", "tiff")}
    kinds |= {"tar": tar, "tgz": gzip.compress(tar), "h5": whole.read_bytes()}
    kinds["pt"] = (quick_run / "best.pt").read_bytes()
    rng, codes, out = random.Random(2), set(), tmp_path / "p.csv"
    expected = [row["probability"] for row in infer(quick_run, whole, out=out)[0]]
    for kind, data in kinds.items():
        path = tmp_path / f"damaged.{kind}"
        for _ in range(NUM_FILES):
            path.write_bytes(damage(data, rng))
            given = (path, whole) if kind == "pt" else (quick_run, whole, path)
            rows, result, err = infer(*given, out=out, expect=None)
            codes.add(result.get("exit", int("num_failed" in result)))
            if rows is None:
                assert str(path) in err and err.count("error: ") == 1
            else:
                assert [row["probability"] for row in rows[:8]] == expected
                assert all(row["source"].startswith(str(path)) for row in rows[8:])
    assert codes == {1, 2}
