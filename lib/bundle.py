"""The bundle: a folder that predicts with a run's checkpoint on a machine without a network.
report.py handover writes it, and audit.py handover checks it.
"""

from importlib.metadata import distributions
from pathlib import Path

from lib.command import REPOSITORY, BadInput, one_line, run_script
from lib.rundir import git, why_no_commit

SUMS = "SHA256SUMS"  # written last: a folder without it is half a bundle
RUN_FILES = ("best.pt", "config.yaml", "summary.json", "epochs.csv")
# the packages that a prediction needs; others serve training and reports
NEEDED = ("torch", "numpy", "h5py", "pyyaml", "pillow")


def tracked_files() -> list[str]:
    """The names of the files that git tracks and that are in the working tree. Raises BadInput
    outside a git repository.
    """
    names = git("ls-files", "-z").split("\0")
    names = [name for name in names if (REPOSITORY / name).is_file()]
    if not names:
        reason = why_no_commit() or f"git tracks no file of {REPOSITORY}"
        raise BadInput(f"nothing says which files are the program's: {reason}")
    return names


def predict_samples(bundle: Path, out: Path) -> None:
    """Predict a bundle's sample patches with its own code, on the CPU, into the CSV file `out`.
    Raises BadInput where that fails.
    """
    bundle = bundle.resolve()
    script = bundle / "code" / "inference.py"
    options = ("--ckpt", bundle / "model", "--device", "cpu", "--out", out)
    run_script(script, bundle / "patches", *options)


def read_licence(meta) -> str:
    """The licence in a package's metadata: its licence expression, else its classifiers, else the
    first line of its licence text.
    """
    classifiers = meta.get_all("Classifier", [])
    names = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License ::")]
    text = meta.get("License-Expression") or "; ".join(names) or meta.get("License", "not stated")
    return one_line(text)


def read_wheels(folder: Path, machine: str, python: str) -> list[dict]:
    """A row for each wheel of a folder: package, version, licence, wheel (its file) and bytes.

    Raises BadInput where a package of NEEDED is missing, or where a wheel is not for `python`, such
    as 3.11, on `machine`, such as x86_64.
    """
    packages = []
    tags = (f"cp{python.replace('.', '')}", "py3", "abi3")
    for path in sorted(folder.glob("*.whl")):
        *_, python_tag, abi, system = path.stem.split("-")
        fits_python = any(tag in f"{python_tag}.{abi}".split(".") for tag in tags)
        if not (fits_python and system.endswith(("any", machine))):
            raise BadInput(f"{path} is not for Python {python} on Linux {machine}")
        distribution = next(distributions(path=[str(path)]), None)
        if not distribution:
            raise BadInput(f"{path} is not a readable wheel: fetch it again")
        package = {
            "package": distribution.name.lower(),
            "version": distribution.version,
            "licence": read_licence(distribution.metadata),
            "wheel": path.name,
            "bytes": path.stat().st_size,
        }
        packages.append(package)
    lacking = {*NEEDED, "pip"} - {package["package"] for package in packages}
    if lacking:
        raise BadInput(f"{folder} has no wheel of {', '.join(sorted(lacking))}")
    return packages
