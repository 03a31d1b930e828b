"""Images a second of inference.py from start to end, from a tar of JPEGs and from HDF5, beside
those of another checkout of this repository, run in turn. Both have to write the same bytes.

python tests/proofs/inference_rates.py --data data/sample [--beside CHECKOUT] [--repeats 3]
"""

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    REPOSITORY,
    Parser,
    positive,
    print_result,
    say,
    script,
)
from lib.pcam import open_split


def write_jpegs(path: Path, data) -> None:
    """A tar of the patches of the split valid."""
    images = open_split(data, "valid").images
    with tarfile.open(path, "w") as tar:
        for _, patches in images.blocks():
            for patch in patches:
                buffer = io.BytesIO()
                Image.fromarray(patch).save(buffer, "JPEG", quality=95)
                member = tarfile.TarInfo(f"{len(tar.members):06}.jpg")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)


def predict(checkout: Path, source: list, views: int, out: Path) -> float:
    """Images a second of inference.py of a checkout; it writes `out`."""
    command = [sys.executable, checkout / "inference.py", *source, "--out", out]
    command += ["--ckpt", REPOSITORY / "assets" / "champion", "--views", views]
    ended = subprocess.run(
        list(map(str, command)), cwd=checkout, capture_output=True, text=True, check=True
    )
    result = json.loads(ended.stdout.splitlines()[-1])
    return result["num"] / result["wall_s"]


@script
def main(argv=None) -> int:
    parser = Parser(prog="inference_rates.py", description="Images a second of inference.py.")
    parser.add_argument("--data", required=True, metavar="DIR", help="PCam; valid is predicted")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N")
    parser.add_argument("--views", type=int, default=1)
    args = parser.parse_args(argv)
    checkouts = {"here": REPOSITORY}
    if args.beside:
        checkouts["beside"] = args.beside.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        jpegs = Path(folder, "jpegs.tar")
        write_jpegs(jpegs, args.data)
        sources = {
            "tar of JPEGs": [jpegs],
            "HDF5 split": [Path(args.data).resolve(), "--split", "valid"],
        }
        for name, source in sources.items():
            rates = {place: [] for place in checkouts}
            for _ in range(args.repeats):
                for place, checkout in checkouts.items():
                    out = Path(folder, f"{place}.csv")
                    rates[place].append(predict(checkout, source, args.views, out))
            row = {"source": name, "views": args.views, "images_per_s": rates}
            if args.beside:
                here, beside = (Path(folder, f"{place}.csv") for place in checkouts)
                row["same_bytes"] = here.read_bytes() == beside.read_bytes()
                row["ratio"] = statistics.median(rates["here"]) / statistics.median(rates["beside"])
            say(json.dumps(row))
            rows.append(row)
    are_equal = all(row.get("same_bytes", True) for row in rows)
    print_result({"held": are_equal, "rows": rows})
    return EXIT_DONE if are_equal else EXIT_FINDING


if __name__ == "__main__":
    sys.exit(main())
