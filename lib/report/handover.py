"""A handover folder: all that predicts with a run's checkpoint on a machine without a network, and
what a reader asks of it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.bundle import NEEDED, RUN_FILES, SUMS, predict_samples, read_wheels, tracked_files
from lib.calibration import calibrate
from lib.checkpoint import load_model
from lib.command import REPOSITORY, BadInput, last_line, run_script, say
from lib.files import atomic_write, file_digest, write_csv, write_json
from lib.metrics import sigmoid
from lib.models import HEADS
from lib.pcam import open_split
from lib.predict import predict_batch, ready_to_predict
from lib.progress import Progress
from lib.report.card import model_card

STICK = REPOSITORY / "jobs" / "stick"
# of manylinux_2_N: what torch asks for, down to the oldest that wheels are still made for
GLIBC_MINORS = range(28, 16, -1)
NUM_DRAWN = 64
NUM_PATCHES = 8
LEAST_TOLERANCE = 1e-3  # float32 in another order of summation stays far below it
PRECISION_MARGIN = 4


def write_handover(run: Path, dest: Path, system: str, python: str, wheels) -> dict:
    """Write the handover folder of a finished run to `dest`, a new or an empty folder; `wheels` is
    a folder of wheels, or None to have pip fetch them.

    `system` is a tag such as manylinux_2_28_x86_64, `python` a version such as 3.11. Raises
    BadInput for a run that is not finished, and wheels that do not fit.
    """
    lacking = [name for name in RUN_FILES if not (run / name).is_file()]
    if lacking:
        raise BadInput(f"{run} is no finished run: it has no {lacking[0]}")
    machine = system.removeprefix("manylinux_2_28_")
    model, cfg, checkpoint = load_model(run)
    with tempfile.TemporaryDirectory(prefix="wheels-") as scratch:
        if not wheels:
            wheels = scratch
            fetch_wheels(scratch, cfg.model in HEADS, machine, python)
        packages = read_wheels(Path(wheels), machine, python)
        copy_files(run, dest, Path(wheels), packages)
    samples = write_samples(dest, model, cfg, checkpoint)
    made_for = {"python": python, "system": "Linux", "machine": machine, "platform": system}
    write_json(dest / "stick.json", made_for | samples)
    write_csv(dest / "packages.csv", packages[0], [package.values() for package in packages])
    pins = [f"{package['package']}=={package['version']}" for package in packages]
    write_text(dest / "wheels" / "requirements.txt", "\n".join(pins))
    write_text(dest / "MODEL_CARD.md", model_card(run, cfg, checkpoint, packages))
    with tempfile.TemporaryDirectory() as scratch:  # a file that git does not track is not there
        predict_samples(dest, Path(scratch, "patches.csv"))
    os.sync()  # first what is summed up, then the sums
    paths = sorted(path for path in dest.rglob("*") if path.is_file())
    sums = [f"{file_digest(path)}  {path.relative_to(dest).as_posix()}" for path in paths]
    write_text(dest / SUMS, "\n".join(sums))
    return {
        "handover": str(dest),
        "num_files": len(paths),
        "num_bytes": sum(path.stat().st_size for path in paths),
        "torch": next(package["version"] for package in packages if package["package"] == "torch"),
        **samples,
        "sha256sums": file_digest(dest / SUMS),
    }


def write_text(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(f"{text.rstrip()}\n")


def copy_files(run: Path, dest: Path, wheels: Path, packages: list[dict]) -> None:
    """Copy into `dest` what stands in a file already."""
    copies = {path.name: path for path in STICK.iterdir() if path.is_file()}
    for name in tracked_files():
        copies[f"code/{name}"] = REPOSITORY / name
    for name in (*RUN_FILES, "meta.json"):
        copies[f"model/{name}"] = run / name
    for package in packages:
        copies[f"wheels/{package['wheel']}"] = wheels / package["wheel"]
    with Progress(len(copies), f"writing {dest}", "files") as progress:
        for name, path in copies.items():
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, dest / name)  # with its mode: run.sh is called
            progress.add()


def fetch_wheels(folder, with_torchvision: bool, machine: str, python: str) -> None:
    """Have pip download what a prediction needs in this environment's versions, torch in a CPU
    build where pip finds one.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    # pip reads a requirement's `python_version < ...` as that of the interpreter that it runs in
    interpreter = sys.executable if python == here else shutil.which(f"python{python}")
    if not interpreter:
        raise BadInput(f"--python {python}: python{python} is not on PATH, to fetch its wheels")
    tags = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS]
    tags.append(f"--platform=manylinux2014_{machine}")
    target = ["--only-binary=:all:", f"--python-version={python}", *tags]

    def pip(*arguments) -> subprocess.CompletedProcess:
        command = [interpreter, "-m", "pip", *arguments, *target]
        return subprocess.run(command, capture_output=True, text=True)

    versions = {name: version(name).partition("+")[0] for name in NEEDED}
    builds = re.findall(r"([\d.]+)\+cpu\b", pip("index", "versions", "torch").stdout)
    if not builds:
        remedy = "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can name a place"
        say(f"pip finds no CPU build of torch, so this will be large; {remedy}")
    elif versions["torch"] not in builds:
        # of another version: a checkpoint opens in it, and the self-test is the judge
        versions["torch"] = builds[0]
    if builds:
        versions["torch"] += "+cpu"
    pins = ["pip", *(f"{name}=={number}" for name, number in versions.items())]
    if with_torchvision:
        pins.append("torchvision")  # of the version that fits torch
    result = pip("download", "--quiet", "--dest", folder, *pins)
    if result.returncode:
        raise BadInput(f"pip download failed: {last_line(result.stderr)}")


def draw_samples() -> np.ndarray:
    """Synthetic patches uint8 (NUM_DRAWN, 96, 96, 3), as prepare.py draws them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "pcam")
        sizes = ("--train", 0, "--valid", 0, "--test", NUM_DRAWN)
        run_script("prepare.py", "synthetic", "--to", folder, *sizes)
        return open_split(folder, "test").images.read(range(NUM_DRAWN))


def write_samples(dest: Path, model, cfg, checkpoint: dict) -> dict:
    """Write a few drawn patches and what the model says of them here, and give the tolerance for
    another machine.

    Other processors and builds round and sum in another way, by less than what the checkpoint's
    number type costs against float32: the tolerance is that difference, measured, times
    PRECISION_MARGIN.
    """
    drawn = draw_samples()
    images = torch.from_numpy(drawn)
    probs = {}
    for precision in ("fp32", cfg.precision):
        ready = ready_to_predict(model, precision)
        logits = predict_batch(ready, images, precision, cfg.views)
        probs[precision] = sigmoid(calibrate(logits.numpy(), checkpoint["calibration"]))
    expected = probs[cfg.precision]
    deviation = float(np.abs(expected - probs["fp32"]).max())
    tolerance = max(LEAST_TOLERANCE, PRECISION_MARGIN * deviation)
    (dest / "patches").mkdir()
    rows = []
    places = np.linspace(0, NUM_DRAWN - 1, NUM_PATCHES).astype(int)
    for row in np.sort(np.argsort(expected)[places]):  # as a folder lists them
        name = f"patches/synthetic_{row:02}.png"
        Image.fromarray(drawn[row]).save(dest / name)
        call = int(expected[row] >= checkpoint["threshold"])
        rows.append((name, 0, f"{expected[row]:.9g}", call))
    write_csv(dest / "expected.csv", ("source", "index", "probability", "prediction"), rows)
    return {"tolerance": round(tolerance, 6), "num_patches": len(rows)}
