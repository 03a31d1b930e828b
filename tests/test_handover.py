"""A handover folder installs and predicts without a network, and refuses by name what is not as it
was written.
"""

import ensurepip
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_script

from lib.audit import checklist
from lib.audit.checklist import audit_checklist
from lib.bundle import NEEDED, tracked_files
from lib.checkpoint import evaluated_weights, load_checkpoint, save_checkpoint
from lib.command import BadInput
from lib.files import file_digest, read_csv, read_json
from lib.report.handover import fetch_wheels, write_handover

pytestmark = pytest.mark.slow

PYTHON = "{}.{}".format(*sys.version_info)
SYSTEM = f"manylinux_2_28_{os.uname().machine}"
MOUNT = """mkdir -p "$1" && mount --bind "$0" "$1" && mount -o remount,ro,bind "$1" && ! touch "$1/x" 2>/dev/null || exit 9
shift
"$@" """
may_unshare = (
    bool(shutil.which("unshare"))
    and not subprocess.run(["unshare", "-mn", "true"], capture_output=True).returncode
)


def write_wheel(folder: Path, name: str, tag="py3-none-any", files=(), version="1.0") -> Path:
    """A wheel of a package without modules, but for `files`."""
    info, path = f"{name}-{version}.dist-info", folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in [
            *files,
            (
                f"{info}/METADATA",
                (
                    f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression:"
                    " MIT\n"
                ),
            ),
            (f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"),
            (f"{info}/RECORD", ""),
        ]:
            wheel.writestr(file, content)
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A wheelhouse of a few KB; its torch brings a .pth that leads to the packages that are
    installed here.
    """
    folder = tmp_path_factory.mktemp("wheels")
    for name in NEEDED:
        here = [("here.pth", sysconfig.get_path("purelib") + "\n")] if name == "torch" else []
        write_wheel(folder, name, files=here)
    if not (pip := [*Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")]):
        pytest.skip("this Python brings no wheel of pip")
    shutil.copy(pip[0], folder)
    return folder


@pytest.fixture(scope="module")
def written(quick_run, wheels, tmp_path_factory):
    """A handover folder that no test may change, and what its writer printed."""
    folder = tmp_path_factory.mktemp("usb") / 'our team\'s "stick" #1'
    return (
        folder,
        run_script(
            "report.py", "handover", quick_run, "--to", folder, "--wheels", wheels, check=0
        ).json,
    )


@pytest.fixture
def stick(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / "a stick"))


def verify(stick: Path, *arguments):
    # -S: the standard library alone
    command = [sys.executable, "-I", "-S", stick / "verify.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    return result


def test_it_holds_what_it_says(written, quick_run):
    stick, told = written
    assert told["num_files"] == sum(path.is_file() for path in stick.rglob("*")) - 1
    assert told["num_bytes"] == sum(
        p.stat().st_size for p in stick.rglob("*") if p.is_file() and p.name != "SHA256SUMS"
    )
    assert (
        told["sha256sums"]
        == file_digest(stick / "SHA256SUMS")
        == json.loads(verify(stick).stdout)["sha256sums"]
    )
    sums = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=stick)
    assert not sums.returncode, "the format is that of sha256sum"
    assert [*map(str, (stick / "code").rglob("*.pyc"))] == [] and (
        stick / "code" / "lib" / "predict.py"
    ).is_file()
    assert {
        row["package"]: row["licence"] for row in read_csv(stick / "packages.csv")
    }.items() > dict.fromkeys(NEEDED, "MIT").items()
    card, summary = (stick / "MODEL_CARD.md").read_text(), read_json(quick_run / "summary.json")
    for name in ("auc", "f2", "pr_auc", "accuracy"):
        assert f"| {summary[f'val_{name}']:.4f} |" in card
    assert "| F2 | " in card and f"{summary['always_positive_f2']:.4f} |" in card
    assert (
        file_digest(quick_run / "best.pt") in card
        and read_json(quick_run / "meta.json")["commit"] in card
    )
    trained = read_json(quick_run / "meta.json")["rows"]["train"]
    assert f"{trained['num']:,} patches, {trained['num_positive']:,} positive" in card
    assert (
        len(read_csv(stick / "expected.csv"))
        == told["num_patches"]
        == len([*(stick / "patches").iterdir()])
    )


def test_it_installs_once_and_predicts_without_a_network_from_a_medium_that_cannot_be_written(
    written, tmp_path
):
    folder, home = tmp_path / "some folder's", tmp_path / "a home"
    for path in (folder, home):
        path.mkdir()
    shutil.copytree(written[0] / "patches", folder / "my patches")
    environment = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "PCAM_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }

    def start_run(*arguments, mounted=may_unshare):
        start, stick = [], written[0]
        if mounted:
            stick = tmp_path / "mounted"
            start = ["unshare", "-mn", "sh", "-c", MOUNT, written[0], stick]
        command = [*start, stick / "run.sh", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    together = [
        start_run("my patches"),
        start_run("my patches", "--out", "same time.csv", mounted=False),
    ]
    for process in together:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert "installing into" in stderr and "the self-test passed" in stderr
        assert json.loads(stdout.splitlines()[-1])["num"] == 8
    rows, expected = read_csv(folder / "predictions.csv"), read_csv(written[0] / "expected.csv")
    assert [row["source"] for row in rows] == [
        row["source"].replace("patches/", "my patches/") for row in expected
    ]
    assert [row["probability"] for row in rows] == [row["probability"] for row in expected]
    later = start_run("my patches", "--out", "other.csv")
    stderr = later.communicate()[1]
    assert later.returncode == 0 and "installing" not in stderr
    assert (folder / "other.csv").read_bytes() == (folder / "predictions.csv").read_bytes()
    assert {path.name for path in (home / ".cache").iterdir()} == {
        path.name for path in (home / ".cache").glob("pcam-*[0-9]")
    }
    assert len([*(home / ".cache").iterdir()]) == 1, "nothing half is left"
    assert verify(written[0]).returncode == 0, "the stick is as it was"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE = {
    "changed: model/best.pt": lambda stick: flip(stick / "model" / "best.pt"),
    "changed: code/lib/predict.py": lambda stick: flip(stick / "code" / "lib" / "predict.py"),
    "changed: expected.csv": lambda stick: link(stick / "expected.csv"),
    "missing: MODEL_CARD.md": lambda stick: (stick / "MODEL_CARD.md").unlink(),
    "additional: code/torch.py": (
        lambda stick: (stick / "code" / "torch.py").write_text("print('mine')")
    ),
    "additional: hashlib.py": (
        lambda stick: (stick / "hashlib.py").write_text("raise SystemExit(0)")
    ),
}


@pytest.mark.parametrize("named", DAMAGE)
def test_a_file_that_is_not_as_it_was_written_is_named_and_nothing_is_run(stick, named, tmp_path):
    DAMAGE[named](stick)
    plain = subprocess.run([sys.executable, stick / "verify.py"], capture_output=True, text=True)
    assert plain.returncode == 1 and f"{named}\n" in plain.stderr
    kind, name = named.split(": ")
    assert name in json.loads(plain.stdout)[kind]
    environment = os.environ | {"PCAM_HOME": str(tmp_path / "home"), "PCAM_PYTHON": sys.executable}
    result = subprocess.run(
        ["sh", stick / "run.sh", "patches"],
        capture_output=True,
        text=True,
        cwd=stick,
        env=environment,
    )
    assert result.returncode == 1 and named in result.stderr and not [*tmp_path.glob("home*")]
    assert name in json.loads(result.stdout.splitlines()[-1])[kind]


def test_what_macos_and_windows_leave_on_a_stick_does_not_stop_it(stick):
    for name in (".DS_Store", "code/._inference.py", "patches/Thumbs.db"):
        (stick / name).write_bytes(b"x")
    for name in ("System Volume Information", ".Spotlight-V100"):
        (stick / name).mkdir()
        (stick / name / "IndexerVolumeGuid").write_bytes(b"x")
    assert verify(stick).returncode == 0
    (stick / "code" / "DS_Store.py").write_text("")
    assert json.loads(verify(stick).stdout)["additional"] == ["code/DS_Store.py"]
    assert "sh run.sh" in (stick / "MODEL_CARD.md").read_text()


def test_a_folder_that_was_not_written_to_its_end_is_said_to_be_one(stick, quick_run, wheels):
    (stick / "SHA256SUMS").unlink()
    (stick / "stick.json").unlink()
    started = subprocess.run(["sh", stick / "run.sh", "patches"], capture_output=True, text=True)
    for result in (verify(stick), started):
        assert result.returncode == 2 and "not written to its end" in result.stderr
    with pytest.raises(BadInput, match="half-written"):
        write_handover(quick_run, stick, SYSTEM, PYTHON, wheels)


def test_another_python_is_refused_in_a_sentence(written):
    spec = importlib.util.spec_from_file_location("verify", written[0] / "verify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made_for = read_json(written[0] / "stick.json")
    assert not module.check_python(made_for)
    for key, value in (("python", "3.9"), ("machine", "riscv64"), ("system", "Plan9")):
        assert value in module.check_python(made_for | {key: value})


def test_the_self_test_refuses_another_probability_and_another_decision(written, tmp_path):
    stick, found = written[0], tmp_path / "found.csv"
    text, tolerance = (
        (stick / "expected.csv").read_text(),
        read_json(stick / "stick.json")["tolerance"],
    )
    row = read_csv(stick / "expected.csv")[3]
    line = f"{row['source']},0,{row['probability']},{row['prediction']}"
    assert line in text
    changes = {
        line: 0,
        f"elsewhere/{line}": 0,
        f"{row['source']},0,{float(row['probability']) + tolerance / 2},{row['prediction']}": 0,
        f"{row['source']},0,{float(row['probability']) + tolerance * 2},{row['prediction']}": 1,
        f"{row['source']},0,{row['probability']},{1 - int(row['prediction'])}": 1,
        f"{row['source']},0,,": 1,
        f"other.png,0,{row['probability']},{row['prediction']}": 1,
    }
    for changed, code in changes.items():
        found.write_text(text.replace(line, changed))
        result = verify(stick, "--predictions", found)
        assert result.returncode == code, changed
        assert json.loads(result.stdout)["wrong"] == ([Path(row["source"]).name] if code else [])


def test_what_cannot_be_written_is_refused_before_anything_is(quick_run, wheels, tmp_path):
    other = Path(shutil.copytree(wheels, tmp_path / "wheels"))
    unfinished = Path(shutil.copytree(quick_run, tmp_path / "run"))
    (unfinished / "summary.json").unlink()
    dest, full = tmp_path / "dest", tmp_path / "full"
    full.mkdir()
    (full / "holiday.jpg").touch()

    def refused(match, run=quick_run, dest=dest, system=SYSTEM, python=PYTHON, wheels=wheels):
        with pytest.raises(BadInput, match=match):
            write_handover(run, dest, system, python, wheels)
        assert not (tmp_path / "dest").exists() and [path.name for path in full.iterdir()] == [
            "holiday.jpg"
        ]

    refused("no finished run", run=unfinished)
    refused("holds other files", dest=full)
    refused("holds other files", dest=full / "holiday.jpg")
    refused("allowed are manylinux", system="win_amd64")
    refused("python3.2 is not on PATH", python="3.2", wheels=None)
    write_wheel(other, "extra", tag="cp39-cp39-any")
    refused("is not for Python", wheels=other)
    (other / "extra-1.0-cp39-cp39-any.whl").unlink()
    numpy = other / "numpy-1.0-py3-none-any.whl"
    numpy.write_bytes(b"PK")
    refused("is not a readable wheel", wheels=other)
    numpy.unlink()
    refused("has no wheel of numpy", wheels=other)


@pytest.mark.parametrize("names", [("torch",), ("torch", "torchvision")], ids=["p4m", "resnet18"])
def test_a_cpu_build_of_torch_is_chosen_where_there_is_one(names, tmp_path, monkeypatch, capsys):
    own = importlib.metadata.version("torch").partition("+")[0]
    house = tmp_path / "index"
    house.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("pip", *NEEDED, *names):
        write_wheel(
            house,
            name,
            version="1.0" if name == "pip" else importlib.metadata.version(name).partition("+")[0],
        )

    def fetched(folder):
        fetch_wheels(tmp_path / folder, [*NEEDED, *names[1:]], os.uname().machine, PYTHON)
        return next(path.name.split("-")[1] for path in (tmp_path / folder).glob("torch-*"))

    assert fetched("plain") == own and "no CPU build" in capsys.readouterr().err
    write_wheel(house, "torch", version="2.1.0+cpu")
    assert fetched("older") == ("2.1.0+cpu" if len(names) == 1 else own), (
        "torchvision fits one torch only"
    )
    for name in names:
        write_wheel(
            house, name, version=importlib.metadata.version(name).partition("+")[0] + "+cpu"
        )
    assert fetched("same") == f"{own}+cpu"
    (house / next(house.glob("numpy-*"))).unlink()
    with pytest.raises(BadInput, match=r"pip download failed: .*numpy"):
        fetched("without numpy")


def test_an_audit_gives_evidence_for_each_part_and_runs_nothing_damaged(written, stick, tmp_path):
    result = run_script("audit.py", "handover", written[0], "--out", tmp_path / "out")
    severity = {
        row["check"]: row["severity"]
        for row in json.loads((tmp_path / "out" / "findings.json").read_text())
    }
    parts = (
        "files",
        "parts",
        "packages and licences",
        "model card",
        "expected predictions",
        "inference.py works",
    )
    assert [severity[part] for part in parts] == ["note"] * len(parts)
    missing = [part for part in severity if severity[part] == "error"]
    assert result.json["missing"] == missing and result.returncode == bool(missing)
    flip(stick / "model" / "best.pt")
    result = run_script("audit.py", "handover", stick, "--out", tmp_path / "out", check=1)
    assert result.json == {
        "num_items": 2,
        "missing": ["files"],
        "findings": str(tmp_path / "out" / "findings.json"),
    }
    assert {"file": "changed: model/best.pt"} in json.loads(
        (tmp_path / "out" / "findings.json").read_text()
    )[0]["rows"]
    run_script("audit.py", "handover", tmp_path, "--out", tmp_path / "out", check=2)


JOURNAL = """# Journal
Repository: https://git.uni.test/team/pcam
Members: Ada (1234567), Grace (s7654321)
![a figure](assets/a.png)
## 1 Reproducibility
"""


def test_the_checklist_is_judged_item_by_item(tmp_path, monkeypatch):
    for name in tracked_files():
        if name != "JOURNAL.md" and not name.startswith("jobs/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / name)
    champion = tmp_path / "assets" / "champion" / "best.pt"
    checkpoint = load_checkpoint(champion)
    monkeypatch.setattr(checklist, "SHIPPED_CHAMPION", checkpoint["weights_sha256"])
    for tensor in evaluated_weights(checkpoint).values():
        tensor += 1
    save_checkpoint(champion, checkpoint)
    journal = tmp_path / "JOURNAL.md"
    journal.write_text(JOURNAL)
    (tmp_path / "assets" / "a.png").touch()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.sbatch").write_text("#!/bin/bash\n#SBATCH --gpus=1\n")

    def errors() -> list[str]:
        return [row["check"] for row in audit_checklist(tmp_path) if row["severity"] == "error"]

    assert errors() == []
    assert "make twin" in audit_checklist(tmp_path)[-1]["advice"], "what the journal still needs"
    for filled, unfilled in (("Ada", "to be filled in"), ("s7654321", "0000000")):
        journal.write_text(JOURNAL.replace(filled, unfilled))
        assert errors() == ["names and ids"]
    journal.write_text(JOURNAL.replace("git.uni.test/team", "example.org/to-be-filled-in"))
    shutil.copy(REPOSITORY / "assets" / "champion" / "best.pt", champion)
    assert errors() == ["repository linked", "best checkpoint"], "nothing of the team's own"
    # the link and the ids after the first page, a picture elsewhere, no Slurm script, no checkpoint
    title, link, members, image, section = JOURNAL.splitlines()
    journal.write_text(
        "\n".join([title, section, link, members, image.replace("assets/a", "../a")])
    )
    (tmp_path / "jobs" / "train.sbatch").unlink()
    champion.unlink()
    assert len(errors()) == 6


def test_what_would_change_or_misuse_the_stick_is_refused(stick, tmp_path):
    def refused(*arguments, **environment):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PCAM_PYTHON": sys.executable,
        } | environment
        command = ["sh", stick / "run.sh", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=stick, env=environment)
        assert result.returncode == 2, result.stderr
        return result.stderr

    assert "lies on the stick" in refused("patches", "--out", stick / "out.csv")
    assert "lies on the stick" in refused("patches", "--out=new.csv")
    assert "there is no nothing" in refused("nothing")
    assert "there is no HOME" in refused("patches", HOME="")
    (stick / "python").mkdir()
    (stick / "python" / "evil.sh").write_text("#!/bin/sh\ntouch ../pwned\n")
    (stick / "python" / "evil.sh").chmod(0o755)
    made_for = json.loads((stick / "stick.json").read_text()) | {"python": "/evil.sh"}
    (stick / "stick.json").write_text(json.dumps(made_for, indent=1))
    assert (
        "names no Python" in refused("patches", PCAM_PYTHON="")
        and not (tmp_path / "pwned").exists()
    )


def test_make_handover_wants_a_place():
    environment = {name: value for name, value in os.environ.items() if name != "DEST"}
    command = ["make", "handover", f"PYTHON={sys.executable}"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2 and "DEST=DIR" in result.stderr
