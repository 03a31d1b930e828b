"""A handover folder: all that predicts with a run's checkpoint on a machine without a network, and
what a reader asks of it.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.bundle import NEEDED, RUN_FILES, SUMS, predict_samples, read_wheels, tracked_files
from lib.calibration import calibrate
from lib.checkpoint import load_model
from lib.command import REPOSITORY, BadInput, one_line, run_script, say
from lib.files import atomic_write, file_digest, require_space, write_csv, write_json
from lib.metrics import sigmoid
from lib.models import HEADS
from lib.pcam import open_split
from lib.predict import predict_batch, ready_to_predict
from lib.progress import Progress
from lib.report.card import model_card
from lib.rundir import git_state

STICK = REPOSITORY / "jobs" / "stick"
# of manylinux_2_N: what torch asks for, down to the oldest that wheels are still made for
GLIBC_MINORS = range(28, 16, -1)
NUM_DRAWN = 64
NUM_PATCHES = 8
SEED = 1
LEAST_TOLERANCE = 1e-3  # float32 in another order of summation stays far below it
PRECISION_MARGIN = 4


def write_handover(run: Path, dest: Path, system: str, python: str, wheels) -> dict:
    """Write the handover folder of a finished run to `dest`, a new or an empty folder; `wheels` is
    a folder of wheels, or None to have pip fetch them.

    `system` is a tag such as manylinux_2_28_x86_64, `python` a version such as 3.11. Raises
    BadInput for a run that is not finished, wheels that do not fit, a disk too small.
    """
    if not all((run / name).is_file() for name in RUN_FILES):
        raise BadInput(f"{run} is no finished run: a handover takes its {', '.join(RUN_FILES)}")
    machine = system.removeprefix("manylinux_2_28_")
    if machine not in ("x86_64", "aarch64"):
        raise BadInput(
            f"--platform {system}: allowed are manylinux_2_28_x86_64 and manylinux_2_28_aarch64"
        )
    model, cfg, checkpoint = load_model(run)
    with tempfile.TemporaryDirectory(prefix="wheels-") as scratch:
        if not wheels:
            wheels = scratch
            names = [*NEEDED, "torchvision"] if cfg.model in HEADS else NEEDED
            fetch_wheels(scratch, names, machine, python)
        packages = read_wheels(Path(wheels), machine, python)
        copy_files(run, dest, Path(wheels), packages)
    samples = write_samples(dest, model, cfg, checkpoint)
    state = git_state()
    made_for = {"python": python, "system": "Linux", "machine": machine, "platform": system}
    made_from = {
        "run": run.resolve().name,
        "commit": state["commit"],
        "uncommitted_changes": bool(state["uncommitted_patch"]),
    }
    write_json(dest / "stick.json", made_for | samples | made_from)
    write_csv(dest / "packages.csv", packages[0], [package.values() for package in packages])
    pins = [f"{package['package']}=={package['version']}" for package in packages]
    write_lines(dest / "wheels" / "requirements.txt", pins)
    card = model_card(run, model, cfg, checkpoint, packages)
    write_lines(dest / "MODEL_CARD.md", card.splitlines())
    require_predictions(dest)
    os.sync()  # first what is summed up, then the sums
    paths = {path.relative_to(dest).as_posix(): path for path in dest.rglob("*") if path.is_file()}
    sums = [f"{file_digest(path)}  {name}" for name, path in sorted(paths.items())]
    write_lines(dest / SUMS, sums)
    return {
        "handover": str(dest),
        "num_files": len(sums),
        "num_bytes": sum(path.stat().st_size for path in paths.values()),
        "torch": next(package["version"] for package in packages if package["package"] == "torch"),
        **samples,
        "sha256sums": file_digest(dest / SUMS),
    }


def write_lines(path: Path, lines: list[str]) -> None:
    with atomic_write(path, "w") as file:
        file.writelines(f"{line}\n" for line in lines)


def copy_files(run: Path, dest: Path, wheels: Path, packages: list[dict]) -> None:
    """Copy into `dest` what stands in a file already. Raises BadInput where the disk is too
    small.
    """
    # first: they say of half a folder that it is
    copies = {path.name: path for path in STICK.iterdir() if path.is_file()}
    copies |= {f"code/{name}": REPOSITORY / name for name in tracked_files()}
    copies |= {f"model/{name}": run / name for name in (*RUN_FILES, "meta.json")}
    copies |= {f"wheels/{package['wheel']}": wheels / package["wheel"] for package in packages}
    num_bytes = sum(path.stat().st_size for path in copies.values())
    require_space(dest, num_bytes + (16 << 20))
    with Progress(num_bytes, f"writing {dest}", "bytes") as progress:
        for name, path in copies.items():
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, dest / name)  # with its mode: run.sh is called
            progress.add(path.stat().st_size)


def require_predictions(dest: Path) -> None:
    """Raise BadInput unless the bundle's code predicts its sample patches: a file that git does not
    track is not in it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            predict_samples(dest, Path(scratch, "patches.csv"))
        except BadInput as error:
            raise BadInput(
                f"{dest} cannot predict (is every file of the program tracked by git?): {error}"
            ) from None


def fetch_wheels(folder, names, machine: str, python: str) -> None:
    """Have pip download the packages `names` in this environment's versions, torch in a CPU build
    where pip finds one.
    """
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    interpreter = sys.executable if python == here else shutil.which(f"python{python}")
    # pip reads a requirement's `python_version < ...` as that of the interpreter that it runs in
    if not interpreter:
        raise BadInput(
            f"--python {python}: python{python} is not on PATH, and its wheels are for it to choose"
        )
    tags = [*(f"manylinux_2_{minor}" for minor in GLIBC_MINORS), "manylinux2014"]
    target = ["--only-binary=:all:", "--python-version", python]
    target += [f"--platform={tag}_{machine}" for tag in tags]

    def pip(*arguments) -> subprocess.CompletedProcess:
        command = [interpreter, "-m", "pip", *arguments, *target]
        return subprocess.run(command, capture_output=True, text=True)

    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    builds = re.findall(r"[\d.]+\+cpu\b", pip("index", "versions", "torch").stdout)
    if f"{installed['torch']}+cpu" in builds:
        wanted = {name: "+cpu" if name.startswith("torch") else "" for name in names}
        installed = {name: version + wanted[name] for name, version in installed.items()}
    elif builds and "torchvision" not in names:
        # of another version: a checkpoint opens in it, and the self-test is the judge
        installed["torch"] = builds[0]
    else:
        say(
            "pip finds no CPU build of torch, so this will be large; PIP_EXTRA_INDEX_URL or"
            " PIP_FIND_LINKS can name a place"
        )
    say(f"fetching torch {installed['torch']} and what a prediction needs")
    pins = [f"{name}=={version}" for name, version in installed.items()]
    result = pip("download", "--quiet", "--dest", folder, "pip", *pins)
    if not result.returncode:
        return
    errors = re.findall("(?m)^.*ERROR.*$", result.stderr)
    raise BadInput(f"pip download failed: {one_line((errors or [result.stderr])[0])}")


def draw_samples() -> np.ndarray:
    """Synthetic patches uint8 (NUM_DRAWN, 96, 96, 3), as prepare.py draws them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "pcam")
        sizes = ("--train", 0, "--valid", 0, "--test", NUM_DRAWN)
        run_script("prepare.py", "synthetic", "--to", folder, *sizes, "--seed", SEED)
        return open_split(folder, "test").images.read(range(NUM_DRAWN))


def write_samples(dest: Path, model, cfg, checkpoint: dict) -> dict:
    """Write a few drawn patches and what the model says of them here, and give the tolerance for
    another machine.

    Other processors and builds round and sum in another way, by less than what the checkpoint's
    number type costs against float32: the tolerance is that difference, measured, times
    PRECISION_MARGIN. Patches near the threshold are not taken, so that no rounding can change a
    decision.
    """

    def predict(images, precision):
        ready, images = ready_to_predict(model, precision), torch.from_numpy(images)
        logits = predict_batch(ready, images, precision, cfg.views, checkpoint["preprocessing"])
        return sigmoid(calibrate(logits.numpy(), checkpoint["calibration"]))

    drawn = draw_samples()
    threshold = checkpoint["threshold"]
    probs = predict(drawn, cfg.precision)
    deviation = float(np.abs(probs - predict(drawn, "fp32")).max())
    tolerance = max(LEAST_TOLERANCE, PRECISION_MARGIN * deviation)
    clear = np.flatnonzero(np.abs(probs - threshold) > 2 * tolerance)
    if not len(clear):
        raise BadInput(
            "the model decides none of the sample patches clearly: nothing could be tested by them"
        )
    order = clear[np.argsort(probs[clear])]
    chosen = np.unique(order[np.linspace(0, len(order) - 1, NUM_PATCHES).round().astype(int)])
    (dest / "patches").mkdir()
    rows = []
    for row, prob in zip(chosen, predict(drawn[chosen], cfg.precision), strict=True):
        name = f"patches/synthetic_{row:02}.png"
        Image.fromarray(drawn[row]).save(dest / name)
        rows.append((name, 0, f"{prob:.9g}", int(prob >= threshold)))
    write_csv(dest / "expected.csv", ("source", "index", "probability", "prediction"), rows)
    return {
        "tolerance": round(tolerance, 6),
        "deviation_from_float32": round(deviation, 6),
        "num_patches": len(rows),
    }
