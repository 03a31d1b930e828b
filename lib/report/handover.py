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
from lib.files import (
    atomic_write,
    file_digest,
    require_space,
    write_csv,
    write_json,
)
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
NUM_DRAWN, NUM_PATCHES, SEED = 64, 8, 1
LEAST_TOLERANCE = 1e-3  # float32 in another order of summation stays far below it
PRECISION_MARGIN = 4


def write_handover(run: Path, dest: Path, system: str, python: str, wheels) -> dict:
    """Write the handover folder of a finished run to `dest`; `wheels` is a folder of wheels, or
    None to have pip fetch them.

    `system` is a tag such as manylinux_2_28_x86_64, `python` a version such as 3.11. Raises
    BadInput for a run that is not finished, a `dest` that holds files, wheels that do not fit, a
    disk too small.
    """
    if not all((run / name).is_file() for name in RUN_FILES):
        raise BadInput(f"{run} is no finished run: a handover takes its {', '.join(RUN_FILES)}")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        half = (dest / "run.sh").exists() and not (dest / SUMS).exists()
        raise BadInput(
            f"{dest} {'is a half-written handover' if half else 'holds other files'}: give a new or"
            " an empty folder"
        )
    machine = re.fullmatch(r"manylinux_2_28_(\w+)", system)
    if not machine:
        raise BadInput(
            f"--platform {system}: allowed are manylinux_2_28_x86_64 and manylinux_2_28_aarch64"
        )
    model, cfg, checkpoint = load_model(run)
    with tempfile.TemporaryDirectory(prefix="wheels-") as fetched:
        if not wheels:
            fetch_wheels(
                fetched,
                [*NEEDED, *(["torchvision"] if cfg.model in HEADS else [])],
                machine[1],
                python,
            )
        packages = read_wheels(Path(wheels or fetched), machine[1], python)
        # first: they say of half a folder that it is
        copies = {path.name: path for path in STICK.iterdir() if path.is_file()}
        copies |= {f"code/{name}": REPOSITORY / name for name in tracked_files()}
        copies |= {
            f"model/{name}": run / name
            for name in (*RUN_FILES, "meta.json")
            if (run / name).is_file()
        }
        copies |= {
            f"wheels/{package['wheel']}": Path(wheels or fetched, package["wheel"])
            for package in packages
        }
        num_bytes = sum(path.stat().st_size for path in copies.values())
        require_space(dest, num_bytes + (16 << 20))
        with Progress(num_bytes, f"writing {dest}", "bytes") as progress:
            for name, path in copies.items():
                (dest / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, dest / name)  # with its mode: run.sh is called
                progress.add(path.stat().st_size)
    made_for = {"python": python, "system": "Linux", "machine": machine[1], "platform": system}
    samples, state = write_samples(dest, model, cfg, checkpoint), git_state()
    dirty = {"uncommitted_changes": bool(state["uncommitted_patch"])}
    write_json(
        dest / "stick.json",
        made_for | samples | {"run": run.resolve().name, "commit": state["commit"]} | dirty,
    )
    write_csv(dest / "packages.csv", list(packages[0]), [package.values() for package in packages])
    with atomic_write(dest / "wheels" / "requirements.txt", "w") as file:
        file.writelines(f"{package['package']}=={package['version']}\n" for package in packages)
    with atomic_write(dest / "MODEL_CARD.md", "w") as file:
        file.write(model_card(run, model, cfg, checkpoint, packages))
    require_predictions(dest)
    os.sync()  # first what is summed up, then the sums
    names = sorted(path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file())
    with atomic_write(dest / SUMS, "w") as file:
        file.writelines(f"{file_digest(dest / name)}  {name}\n" for name in names)
    num_bytes = sum((dest / name).stat().st_size for name in names)
    build = next(package["version"] for package in packages if package["package"] == "torch")
    result = {
        "handover": str(dest),
        "num_files": len(names),
        "num_bytes": num_bytes,
        "torch": build,
        **samples,
    }
    return result | {"sha256sums": file_digest(dest / SUMS)}


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
            f" (here: {here})"
        )
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS] + [
        f"manylinux2014_{machine}"
    ]
    target = [
        "--only-binary",
        ":all:",
        "--python-version",
        python,
        *(f"--platform={tag}" for tag in platforms),
    ]

    def pip(*arguments):
        result = subprocess.run(
            [interpreter, "-m", "pip", *arguments, *target],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            why = [line for line in result.stderr.splitlines() if "ERROR" in line] or [
                result.stderr or "no word from it"
            ]
            raise BadInput(f"pip {arguments[0]} failed: {one_line(why[0])}")
        return result.stdout

    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    cpu = {
        name: re.findall(r"[\d.]+\+cpu\b", pip("index", "versions", name))
        for name in names
        if name.startswith("torch")
    }
    if all(f"{installed[name]}+cpu" in builds for name, builds in cpu.items()):
        installed |= {name: f"{installed[name]}+cpu" for name in cpu}
    elif cpu["torch"] and len(cpu) == 1:
        # of another version: a checkpoint opens in it, and the self-test is the judge
        installed["torch"] = cpu["torch"][0]
    else:
        say(
            "pip finds no CPU build of torch, so this will be large; PIP_EXTRA_INDEX_URL or"
            " PIP_FIND_LINKS can name a place"
        )
    say(f"fetching torch {installed['torch']} and what a prediction needs")
    pip(
        "download",
        "--quiet",
        "--dest",
        str(folder),
        "pip",
        *(f"{name}=={version}" for name, version in installed.items()),
    )


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
    drawn = draw_samples()

    def probs(images, precision):
        ready, images = ready_to_predict(model, precision), torch.from_numpy(images)
        logits = predict_batch(ready, images, precision, cfg.views, checkpoint["preprocessing"])
        return sigmoid(calibrate(logits.numpy(), checkpoint["calibration"]))

    found, threshold = probs(drawn, cfg.precision), checkpoint["threshold"]
    deviation = float(np.abs(found - probs(drawn, "fp32")).max())
    tolerance = max(LEAST_TOLERANCE, PRECISION_MARGIN * deviation)
    clear = np.flatnonzero(np.abs(found - threshold) > 2 * tolerance)
    if not len(clear):
        raise BadInput(
            "the model decides none of the sample patches clearly: nothing could be tested by them"
        )
    order = clear[np.argsort(found[clear])]
    chosen = np.unique(order[np.linspace(0, len(order) - 1, NUM_PATCHES).round().astype(int)])
    names = [f"patches/synthetic_{row:02}.png" for row in chosen]
    (dest / "patches").mkdir()
    for name, row in zip(names, chosen, strict=True):
        Image.fromarray(drawn[row]).save(dest / name)
    probabilities = probs(drawn[chosen], cfg.precision)
    rows = [
        (name, 0, f"{prob:.9g}", int(prob >= threshold))
        for name, prob in zip(names, probabilities, strict=True)
    ]
    write_csv(dest / "expected.csv", ("source", "index", "probability", "prediction"), rows)
    return {
        "tolerance": round(tolerance, 6),
        "deviation_from_float32": round(deviation, 6),
        "num_patches": len(names),
    }
