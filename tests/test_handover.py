"""A handover folder installs and predicts without a network, and refuses by name what is not as it
was written.
"""

import ensurepip
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

import audit
import report
from lib.audit import checklist
from lib.audit.checklist import audit_checklist
from lib.blocks import show
from lib.bundle import NEEDED
from lib.checkpoint import evaluated_weights, load_checkpoint, save_checkpoint
from lib.files import file_digest, read_csv, read_json

pytestmark = pytest.mark.slow

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MOUNT = """mkdir -p "$1" && mount --bind "$0" "$1" && mount -o remount,ro,bind "$1" && ! touch "$1/x" 2>/dev/null || exit 9
shift
"$@" """
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def write_wheel(folder: Path, name: str, tag="py3-none-any", files=(), version="1.0") -> Path:
    """A wheel of a package without modules, but for `files`."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-{tag}.whl"
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n"
    about = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    contents = {f"{info}/METADATA": metadata, f"{info}/WHEEL": about, f"{info}/RECORD": ""}
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in [*files, *contents.items()]:
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
    pip = [*Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")]
    if not pip:
        pytest.skip("this Python brings no wheel of pip")
    shutil.copy(pip[0], folder)
    return folder


@pytest.fixture(scope="module")
def written(quick_run, wheels, tmp_path_factory):
    """A handover folder that no test may change, and what its writer printed."""
    folder = tmp_path_factory.mktemp("usb") / 'our team\'s "stick" #1'
    options = ("--to", folder, "--wheels", wheels)
    return folder, run_script("report.py", "handover", quick_run, *options, check=0).json


@pytest.fixture
def stick(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / "a stick"))


def verify(stick: Path, *arguments):
    """verify.py of a stick; -S: with the standard library alone."""
    command = [sys.executable, "-I", "-S", stick / "verify.py", *arguments]
    result = subprocess.run(command, **PIPES)
    assert "Traceback" not in result.stderr
    result.json = json.loads(result.stdout)
    return result


def start_run(stick: Path, *arguments, cwd=None, prefix=(), **environment):
    environment = {"PATH": os.environ["PATH"], "PCAM_PYTHON": sys.executable, **environment}
    command = [*prefix, "sh", stick / "run.sh", *arguments]
    return subprocess.Popen(command, cwd=cwd or stick, env=environment, **PIPES)


def test_it_holds_what_it_says(written, quick_run):
    stick, result = written
    assert result["sha256sums"] == verify(stick).json["sha256sums"]
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert not subprocess.run(check, cwd=stick).returncode, "the format is that of sha256sum"
    licences = {row["package"]: row["licence"] for row in read_csv(stick / "packages.csv")}
    assert licences.items() > dict.fromkeys(NEEDED, "MIT").items()
    assert len(read_csv(stick / "expected.csv")) == len([*(stick / "patches").iterdir()]) == 8
    card = (stick / "MODEL_CARD.md").read_text()
    summary = read_json(quick_run / "summary.json")
    scores = [show(summary[name]) for name in ("val_auc", "val_f2", "always_positive_f2")]
    digests = (read_json(quick_run / "meta.json")["commit"], file_digest(quick_run / "best.pt"))
    for words in (*scores, *digests, "160 patches", "sh run.sh"):
        assert words in card


def test_it_installs_once_and_predicts_without_a_network_from_a_medium_that_cannot_be_written(
    written, tmp_path
):
    folder = tmp_path / "some folder's"
    home = tmp_path / "a home"
    stick = written[0]
    shutil.copytree(stick / "patches", folder / "my patches")
    may_unshare = not subprocess.run(["unshare", "-mn", "true"], **PIPES).returncode
    mounted = tmp_path / "mounted" if may_unshare else stick
    prefix = ["unshare", "-mn", "sh", "-c", MOUNT, stick, mounted] if may_unshare else ()
    options = {"cwd": folder, "HOME": str(home), "OMP_NUM_THREADS": "1", "prefix": prefix}
    process = start_run(mounted, "my patches", **options)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "installing into" in stderr and "the self-test passed" in stderr
    assert json.loads(stdout.splitlines()[-1])["num"] == 8
    rows = read_csv(folder / "predictions.csv")
    for row, wanted in zip(rows, read_csv(stick / "expected.csv"), strict=True):
        assert row["source"] == wanted["source"].replace("patches/", "my patches/")
        assert float(row["probability"]) == pytest.approx(float(wanted["probability"]), abs=1e-5)
    (installed,) = (home / ".cache").iterdir()  # nothing half is left
    sums = (stick / "SHA256SUMS").read_bytes()
    assert (installed / "installed").read_bytes() == sums, "so it is not installed again"
    assert verify(stick).returncode == 0, "the stick is as it was"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "changed: model/best.pt": flip,
    "missing: MODEL_CARD.md": Path.unlink,
    "additional: code/torch.py": lambda path: path.write_text("print('mine')"),
    "additional: hashlib.py": lambda path: path.write_text("raise SystemExit(0)"),
}


def test_a_file_that_is_not_as_it_was_written_is_named_and_nothing_is_run(stick, tmp_path):
    for sentence, damage in DAMAGE.items():
        damage(stick / sentence.split(": ")[1])
    plain = subprocess.run([sys.executable, stick / "verify.py"], **PIPES)
    run = start_run(stick, "patches", PCAM_HOME=str(tmp_path / "home"))
    stderr = run.communicate()[1]
    assert plain.returncode == run.returncode == 1 and not [*tmp_path.glob("home*")]
    for sentence in DAMAGE:
        kind, name = sentence.split(": ")
        assert f"{sentence}\n" in stderr and name in json.loads(plain.stdout)[kind]


def test_what_macos_and_windows_leave_on_a_stick_does_not_stop_it(stick):
    for name in (".DS_Store", "code/._inference.py", "patches/Thumbs.db"):
        (stick / name).write_bytes(b"x")
    for name in ("System Volume Information", ".Spotlight-V100"):
        (stick / name).mkdir()
        (stick / name / "IndexerVolumeGuid").write_bytes(b"x")
    assert verify(stick).returncode == 0
    (stick / "code" / "DS_Store.py").write_text("")
    assert verify(stick).json["additional"] == ["code/DS_Store.py"]


def test_another_python_and_half_a_folder_are_refused_in_a_sentence(stick):
    assert verify(stick, "--python").returncode == 0
    about = stick / "stick.json"
    sums = stick / "SHA256SUMS"
    before = file_digest(about)
    about.write_text(about.read_text().replace("Linux", "Plan9"))
    sums.write_text(sums.read_text().replace(before, file_digest(about)))
    result = verify(stick, "--python")
    assert result.returncode == 2 and "Plan9" in result.stderr
    sums.unlink()
    process = start_run(stick, "patches")
    assert process.wait() == 2 and "not written to its end" in process.communicate()[1]
    assert verify(stick).returncode == 2


def test_the_self_test_refuses_another_probability(written, tmp_path):
    stick = written[0]
    predictions = tmp_path / "predictions.csv"
    tolerance = read_json(stick / "stick.json")["tolerance"]
    expected = (stick / "expected.csv").read_text()
    prob = read_csv(stick / "expected.csv")[3]["probability"]

    def judge(text: str) -> int:
        predictions.write_text(text)
        return verify(stick, "--predictions", predictions).returncode

    assert judge(expected.replace(prob, str(float(prob) + tolerance / 2))) == 0
    assert judge(expected.replace(prob, str(float(prob) + tolerance * 2))) == 1
    assert judge(expected.replace(prob, "")) == 1
    assert judge(expected.rpartition("patches/")[0]) == 1, "a patch is lacking"


def test_what_cannot_be_written_is_refused_before_anything_is(quick_run, wheels, tmp_path, capsys):
    other = Path(shutil.copytree(wheels, tmp_path / "wheels"))
    numpy = other / "numpy-1.0-py3-none-any.whl"
    dest = tmp_path / "dest"

    def refused(sentence, *options, run=quick_run):
        command = ["handover", run, "--to", dest, *options]
        assert report.main([*map(str, command)]) == 2
        assert sentence in capsys.readouterr().err and not dest.exists()

    refused("holds files already", "--to", quick_run)
    refused("python3.2 is not on PATH", "--python", "3.2")
    numpy.write_bytes(b"PK")
    refused("is not a readable wheel", "--wheels", other)
    numpy.unlink()
    refused("has no wheel of numpy", "--wheels", other)
    write_wheel(other, "x", tag="cp39-cp39-any")
    refused("is not for Python", "--wheels", other)
    unfinished = Path(shutil.copytree(quick_run, tmp_path / "run"))
    (unfinished / "summary.json").unlink()
    refused("no finished run", run=unfinished)


def test_an_audit_gives_evidence_for_each_part_and_runs_nothing_damaged(written, stick, tmp_path):
    findings = checklist.audit_folder(written[0])
    notes = {row["check"] for row in findings if row["severity"] == "note"}
    assert notes == {"files", "expected predictions"}
    flip(stick / "model" / "best.pt")
    assert audit.main(["handover", str(stick), "--out", str(tmp_path)]) == 1
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings[0]["severity"] == "error"
    assert "changed: model/best.pt" in findings[0]["measured"]


JOURNAL = """# Journal
Repository: https://git.uni.test/team/pcam
Members: Ada (1234567), Grace (s7654321)
![a figure](assets/a.png)
## 1 Reproducibility
"""


def test_the_checklist_is_judged_item_by_item(tmp_path, monkeypatch):
    # which takes its time; the stick's own prediction shows that a copy works
    monkeypatch.setattr(checklist, "check_inference", lambda _folder: "")
    shipped = REPOSITORY / "assets" / "champion" / "best.pt"
    champion = tmp_path / "assets" / "champion" / "best.pt"
    journal = tmp_path / "JOURNAL.md"
    champion.parent.mkdir(parents=True)
    checkpoint = load_checkpoint(shipped)
    monkeypatch.setattr(checklist, "SHIPPED_CHAMPION", checkpoint["weights_sha256"])
    for tensor in evaluated_weights(checkpoint).values():
        tensor += 1
    save_checkpoint(champion, checkpoint)
    journal.write_text(JOURNAL)
    (tmp_path / "assets" / "a.png").touch()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.sbatch").write_text("#!/bin/bash\n#SBATCH --gpus=1\n")

    def errors() -> set[str]:
        findings = audit_checklist(tmp_path)
        commands = [row["command"] for row in findings[-1]["rows"]]
        assert any("make twin" in command for command in commands), "what the journal still needs"
        return {row["check"] for row in findings if row["severity"] == "error"}

    assert errors() == set()
    unfilled = JOURNAL.replace("s7654321", "0000000")
    journal.write_text(unfilled.replace("git.uni.test/team", "example.org/to-be-filled-in"))
    shutil.copy(shipped, champion)
    assert errors() == {"repository linked", "best checkpoint", "names and ids"}
    # the link and the ids after the first page, a picture elsewhere, no Slurm script, no checkpoint
    first, *rest = JOURNAL.replace("assets/a", "../a").splitlines()
    journal.write_text("\n".join([first, "## 1 Reproducibility", *rest]))
    (tmp_path / "jobs" / "train.sbatch").unlink()
    champion.unlink()
    assert len(errors()) == 5


def test_what_would_change_the_stick_is_refused(stick, tmp_path):
    def refused(sentence, *arguments, **environment):
        process = start_run(stick, *arguments, **({"HOME": str(tmp_path)} | environment))
        assert process.wait() == 2 and sentence in process.communicate()[1]

    refused("lies on the stick", "patches", "--out=new.csv")
    refused("there is no nothing", "nothing")
    refused("there is no HOME", "patches", HOME="")
