"""The journal says what the files say: every question has its place, every number its file, and
what disagrees is named.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, REPOSITORY
from damaged import write_damaged_edition
from PIL import Image

import audit
import inference
import report
import sweep
import train
from lib.command import BadInput
from lib.config import read_yaml
from lib.files import read_csv, read_json, write_csv, write_json
from lib.metrics import compute_confusion
from lib.report import evidence, journal
from lib.report.evidence import choose_seeds, find_code, git, read_code, read_said
from lib.report.sections import ANSWERS, read_questions

pytestmark = pytest.mark.slow

SMALL = [option for option in QUICK if not option.startswith(("name=", "epochs="))] + [
    "limit_train=96"
]
# what is asked for, in the words of the list of questions: section, then what a heading in it must
# hold
ASKED = {
    "1 Reproducibility": (
        "non-determinism",
        "controlled",
        "exact code",
        "Twin runs: identical or not",
    ),
    "2 Data": (
        "final counts per split and class",
        "leakage",
        "statistics",
        "nested",
        "larger with fewer",
        "poisoning",
    ),
    "3 Configuration": (
        "centralised parameters",
        "loaded",
        "What it changes",
        "can still go wrong",
    ),
    "4 Dynamics": (
        "Global gradient norm per step",
        "why per step",
        "spikes",
        "Learning rate over time",
        "decays late",
    ),
    "5.1 Tracking": (
        (
            "Two metrics, and why",
            "deviation over the seeds",
            "printing does not scale",
            "initialisation",
            "environment",
        )
        + ("reproduce a run", "checkpoint for new data", "Deployment risks")
    ),
    "5.2 Hyper-parameters": (
        "Search space, and why",
        "Parallel coordinates",
        "confusion matrix",
        "0.5 is not",
        "cost",
        "baselines",
    ),
    "6 Slices and errors": (
        "False positives and false negatives",
        "how it is isolated",
        "global score hides",
    ),
    "7 Collaboration and CI": (
        "Consolidation",
        "Pull request and CI",
        "CPU build",
        "merge conflict",
        "last fifteen commits",
    ),
    "8 Benchmark": (
        "throughput is measured",
        "precision changes",
        "another day",
        "batch 1",
        "Scaling",
        "bottleneck",
    ),
    "9 Documentation": ("installation, data, training, inference", "USB stick"),
    "Checklist": ("handed in",),
}
needs_git = pytest.mark.skipif(
    not git("rev-parse", "HEAD"), reason="needs the repository's history"
)


def call(main, *arguments, codes=(0,)) -> None:
    assert main([*map(str, arguments)]) in codes


def write_model_audit(folder: Path, predictions: Path) -> None:
    """The files of an audit of a model, in the form in which the journal reads them, from real
    predictions.
    """
    rows = read_csv(predictions)
    labels = np.array([int(row["label"]) for row in rows])
    probs = np.array([float(row["probability"]) for row in rows])
    folder.mkdir(parents=True)
    shutil.copy(predictions, folder)
    confusion = compute_confusion(labels, probs >= 0.3)
    write_csv(
        folder / "thresholds.csv",
        ("rule", "threshold", "recall", "specificity", "precision", *confusion),
        [["one half", 0.3, 0.9, 0.5, 0.6, *confusion.values()]],
    )
    wrong = [
        ["valid", row["index"], row["label"], row["probability"]]
        for row in rows
        if row["label"] != row["prediction"]
    ]
    write_csv(folder / "errors.csv", ("split", "index", "label", "probability"), wrong)
    slices = [["eosin", "below 0.1", 30, 0.8], ["eosin", "0.1 or more", 34, 0.9]]
    write_csv(folder / "slices.csv", ("feature", "slice", "num", "auc"), slices)
    overall = {"auc": {"value": 0.85, "low": 0.8, "high": 0.9}}
    write_json(folder / "scores.json", {"checkpoint": {"threshold": 0.3}, "global": overall})
    for name in ("curves", "reliability"):
        write_csv(folder / f"{name}.csv", ("x", "y"), [[0, 1]])
    draw_stand_ins(folder, "curves", "reliability", "slices", "errors")


def draw_stand_ins(folder: Path, *names: str) -> None:
    """PNGs where another script would have drawn its own."""
    for number, name in enumerate(names):
        Image.new("RGB", (40, 40 + number), "purple").save(folder / f"{name}.png")


def write_benchmark(path: Path) -> None:
    row = {
        "case": "default",
        "partition": "thin_course",
        "node_type": "a node",
        "job_id": "12",
        "gpu": "none",
        "status": "ok",
    }
    rows = [
        row | {"what": "infer", "model": model, "batch_size": size, "precision": precision, "memory_bytes": None}
        | {"factor": size**0.5, "case": "default" if precision == "bf16" else "fp32"}
        | {"images_per_s": 50.0 * size**0.5 * speed, "low": 45.0 * size**0.5 * speed, "high": 55.0 * size**0.5 * speed}
        for model, speed in (("cnn", 2), ("p4m", 1)) for size in (1, 8, 512) for precision in ("bf16", "fp32")
    ]  # fmt: skip
    rows.append(
        rows[-1]
        | {
            "batch_size": 1024,
            "images_per_s": None,
            "low": None,
            "high": None,
            "status": "out of memory",
        }
    )
    path.parent.mkdir(parents=True)
    write_json(
        path,
        {
            "rows": rows,
            "verdict": {"sentence": "The model's computing is the bottleneck.", "limit_s": 0.5},
        },
    )
    draw_stand_ins(path.parent, "scaling", "stages")


@pytest.fixture(scope="module")
def made(pcam_dir, tmp_path_factory):
    """A folder with runs, a search, audits and a journal of them that no test may change."""
    root = tmp_path_factory.mktemp("team") / "our journal"
    runs, options = root / "runs", [f"data_dir={pcam_dir}", *SMALL]
    for seed in (1, 2, 3):
        call(
            train.main,
            "--runs",
            runs,
            "--trace",
            *options,
            "epochs=1",
            "name=quick",
            f"seed={seed}",
        )
    first = sorted(runs.iterdir())[0]
    call(
        train.main,
        "--runs",
        root / "elsewhere",
        "--trace",
        *options,
        "epochs=1",
        "name=quick",
        "seed=1",
    )
    call(
        audit.main,
        "twin",
        first,
        next((root / "elsewhere").iterdir()),
        "--out",
        root / "audit-twin",
    )
    write_damaged_edition(pcam_dir, root / "damaged", 80)
    call(
        audit.main,
        "data",
        root / "damaged",
        "--out",
        root / "audit-data",
        "--checks",
        "files,values,balance,leakage",
        codes=(0, 1),
    )
    space = {
        "design": "sobol",
        "trials": 2,
        "seed": 1,
        "seeds": [1],
        "rungs": [1],
        "champion_seeds": 3,
    }
    write_json(
        root / "space.yaml",
        space | {"ranges": {"lr": {"log": [0.002, 0.02]}, "batch_size": {"choice": [32, 48]}}},
    )
    where = ("--sweeps", root / "sweeps")
    call(sweep.main, "plan", root / "space.yaml", "--name", "tiny", *where, *options)
    call(
        sweep.main,
        "promote",
        "tiny",
        "--finish",
        *where,
        "--runs",
        runs,
        "--processes",
        2,
        "--rung",
        0,
    )
    champion = root / "assets" / "champion"
    shutil.copytree(first, champion, ignore=shutil.ignore_patterns("last.pt", "trace*"))
    predictions = first / "predictions.csv"
    call(inference.main, "--ckpt", first, pcam_dir, "--split", "valid", "--out", predictions)
    write_model_audit(root / "assets" / "model", predictions)
    write_benchmark(root / "assets" / "benchmark" / "benchmark.json")
    for name in ("reproducibility", "audit", "handover"):
        shutil.copy(REPOSITORY / "assets" / f"{name}.json", root / "assets")
    said = read_yaml(REPOSITORY / "journal.yaml") | {
        "runs": [],
        "search": "",
        "audit": "",
        "twin": "",
    }
    said["pictures"] = {
        "damage": "audit-data/suspects.png",
        "errors": "assets/model/errors.png",
        "remark": "Drawn patches.",
    }
    write_json(root / "journal.yaml", said)  # JSON is YAML
    call(report.main, "journal", root)
    return root


@pytest.fixture
def copy(made, tmp_path):
    """Another copy of the folder, without what only the machine of the runs has."""
    return Path(
        shutil.copytree(
            made,
            tmp_path / "clone",
            ignore=shutil.ignore_patterns(
                "runs", "sweeps", "audit-data", "audit-twin", "elsewhere"
            ),
        )
    )


def test_every_question_has_its_place_and_is_answered(made):
    text = (made / "JOURNAL.md").read_text()
    sections = dict(re.findall(r"(?ms)^## (.+?)\n(.*?)(?=^## |\Z)", text))
    assert list(sections) == list(ASKED)
    for section, wanted in ASKED.items():
        questions = re.findall(r"(?ms)^### (.+?)\n(.*?)(?=^### |\Z)", sections[section])
        for words in wanted:
            assert any(words in question for question, _ in questions), f"{section}: {words}"
        assert all(len(answer) > 100 for _, answer in questions), section
    assert re.findall("Not measured yet.*", text) == [
        "Not measured yet**: run `make sweep SPACE=assets/space.yaml`."
    ], "finalists"
    front = text.split("## 1 ")[0]
    assert all(words in front for words in ("Group", "Members", "Repository", "Base set-up"))


def test_what_was_measured_is_shown(made):
    text = (made / "JOURNAL.md").read_text()
    auc = [
        read_json(path)["val_auc"]
        for path in sorted(made.glob("assets/evidence/seeds/*/summary.json"))
    ]
    assert (
        f"| AUC | {' | '.join(f'{value:.4g}' for value in auc)} | {np.mean(auc):.4g} |"
        f" {np.std(auc, ddof=1):.4g} |" in text
    )
    assert re.search(r"(\d+) of \1 traced steps are equal to the bit", text)
    assert "bytes a value | 4 | 1" in text and "values: nan" in text, (
        "the size of a damaged edition, and its damage"
    )
    assert (
        "| infer | default | cnn | bf16 | 512 | 2263 | 2036 | 2489 | 22.63 |" in text
        and "out of memory" in text
    )
    assert "| thin_course | infer | p4m | 8 | 141.4 | 141.4 |" in text, (
        "precisions beside each other"
    )
    assert re.search(
        r"!\[The champion on [\d,]+ patches of validation, calibrated, at its threshold 0.3\]", text
    )
    assert re.search(
        r"!\[Suspect patches. Drawn patches\]\(assets/evidence/pictures/damage.png\)", text
    )


def test_figures_of_other_scripts_are_shown_beside_its_own(made):
    own = {"gradient-norm", "learning-rate", "metrics", "champion", "decisions", "commits"}
    copied = {
        "audit-counts": "audit-data/counts.png",
        "audit-histograms": "audit-data/histograms.png",
        "twin-timeline": "audit-twin/timeline.png",
        "search-trials": "sweeps/tiny/trials.png",
        "benchmark-scaling": "assets/benchmark/scaling.png",
        "benchmark-stages": "assets/benchmark/stages.png",
    }
    for name in ("curves", "reliability", "slices"):
        copied[f"model-{name}"] = f"assets/model/{name}.png"
    shown = {path.stem: path.read_bytes() for path in made.glob("assets/journal/*.png")}
    assert set(shown) == own | set(copied)
    for name, source in copied.items():
        assert shown[name] == (made / source).read_bytes()


def test_every_image_is_there_and_every_source_has_its_digest(made):
    text = (made / "JOURNAL.md").read_text()
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(images) == len(set(images)) and all(
        re.match(r"assets/[\w/-]+\.png", name) for name in images
    )
    for name in images:
        Image.open(made / name).verify()
    cited = dict(re.findall(r"`(assets/[^`]+|[\w.]+)` `([0-9a-f]{12})`", text))
    assert len(cited) > 20
    for name, digest in cited.items():
        assert (made / name).is_file() and evidence.file_digest(made / name).startswith(digest)


def test_evidence_holds_no_folder_host_or_argument_of_the_machine(made):
    for path in made.glob("assets/evidence/**/*.json"):
        text = path.read_text()
        assert not re.search(r'"(host|cwd|argv|pid|uncommitted_patch|folder)":', text), path
        assert str(made) not in text or path.name == "plan.json", path


@needs_git
def test_code_is_quoted_as_git_has_it(made):
    text, quotes = (made / "JOURNAL.md").read_text(), 0
    pattern = (
        r"`([\w./]+):(\d+) at ([0-9a-f]{10})(?:, the commit of the runs)?`:\n\n````\n(.*?)\n````"
    )
    for file, line, commit, code in re.findall(pattern, text, re.DOTALL):
        lines = code.splitlines()
        assert read_code(commit, file).splitlines()[int(line) - 1 :][: len(lines)] == lines
        quotes += 1
    assert quotes > 25


def test_code_is_found_by_name():
    text = "import x\n\n# why\n@x.y\ndef f(a):\n    return a\n\nA, B = 1, 2\nC = {\n 1,\n}\n"
    assert find_code("a.py", text, "f") == (3, "# why\n@x.y\ndef f(a):\n    return a")
    assert find_code("a.py", text, "C") == (9, "C = {\n 1,\n}")
    assert find_code("a.py", text, "g") == (0, "")
    assert find_code("a.yml", "on:\n  push:\n\n  pull:\njobs:\n", "on:") == (
        1,
        "on:\n  push:\n\n  pull:",
    )
    assert find_code("a.md", "one\n\n- two\n  three\n- four\n", "three") == (3, "- two\n  three")
    assert find_code("a.yml", "a: 1\nb: 2\n", "") == (1, "a: 1\nb: 2")


def test_every_quote_that_is_asked_for_is_there():
    codes = [code for questions in read_questions().values() for *_, code in questions]
    asked = [
        item.strip().partition(":")[::2]
        for code in codes
        for item in code.split(";")
        if item.strip()
    ]
    lines = {
        (file, name.strip()): find_code(file, read_code("", file), name.strip())[0]
        for file, names in asked
        for name in names.split(",")
    }
    assert len(lines) > 20 and not [quoted for quoted, line in lines.items() if not line]


def test_the_check_passes_without_the_runs_and_the_journal_is_made_again_from_evidence(copy, made):
    assert journal.check_journal(copy) == []
    before = {
        path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()
    }
    journal.write_journal(copy)
    after = {
        path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()
    }
    differing = [str(name) for name in before | after if before.get(name) != after.get(name)]
    assert (
        not differing and (copy / "JOURNAL.md").read_bytes() == (made / "JOURNAL.md").read_bytes()
    )


def substitute(path: Path, pattern: str, into: str) -> None:
    text = path.read_text()
    changed = re.sub(pattern, into, text, count=1)
    assert changed != text, pattern
    path.write_text(changed)


ALTERED = {
    "a digit": (
        lambda root: substitute(root / "JOURNAL.md", r"(\| AUC \| 0\.\d)\d", r"\g<1>x"),
        ["Mean and deviation", "AUC"],
    ),
    "a quoted line": (
        lambda root: substitute(root / "JOURNAL.md", r"random\.seed\(seed\)", "random.seed(7)"),
        ["The exact code", "random.seed(7)", "random.seed(seed)"],
    ),
    "a digest": (
        lambda root: substitute(root / "JOURNAL.md", r"(plan\.json` `)\w{4}", r"\g<1>0000"),
        ["plan.json", "0000"],
    ),
    "a CSV": (
        lambda root: substitute(
            next(root.glob("assets/evidence/seeds/*/steps.csv")), r"\n1,1,0\.", "\n1,1,1."
        ),
        ["steps.csv", "gradient-norm.png"],
    ),
    "a file that is gone": (
        lambda root: (root / "assets/model/slices.csv").unlink(),
        ["A slice, how it is isolated"],
    ),
    "a plan that is gone": (
        lambda root: (root / "assets/evidence/search/plan.json").unlink(),
        ["search"],
    ),
    "a damaged summary": (
        lambda root: next(root.glob("assets/evidence/seeds/*/summary.json")).write_text('{"half'),
        ["summary.json", "is not valid JSON"],
    ),
    "a damaged CSV": (
        lambda root: substitute(root / "assets/model/errors.csv", "label", "lable"),
        ["a file that it cites is damaged"],
    ),
    "a picture": (
        lambda root: Image.new("RGB", (9, 9)).save(root / "assets/journal/metrics.png"),
        ["metrics.png", "Mean and deviation"],
    ),
    "a picture of another script": (
        lambda root: Image.new("RGB", (9, 9)).save(root / "assets/model/slices.png"),
        ["model/slices.png", "A slice, how it is isolated"],
    ),
    "a copy of a picture": (
        lambda root: Image.new("RGB", (9, 9)).save(root / "assets/journal/twin-timeline.png"),
        ["Picture `", "Twin runs"],
    ),
    "an answer": (lambda root: substitute(root / "journal.yaml", "An?|One", "Another"), [": "]),
    "a line that is gone": (
        lambda root: substitute(root / "JOURNAL.md", r"\| accuracy \|.*\n", ""),
        ["says `nothing`", "accuracy"],
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_disagrees_is_named(copy, what, capsys):
    change, words = ALTERED[what]
    change(copy)
    assert report.main(["journal", str(copy), "--check"]) == 1
    out, err = capsys.readouterr()
    assert all(word in err for word in words), err
    assert json.loads(out.splitlines()[-1])["num_differing"] > 0


def test_damaged_sources_leave_the_evidence_as_it_was(made, tmp_path, capsys):
    root = Path(shutil.copytree(made, tmp_path / "root", symlinks=True))
    before = {
        path: path.read_bytes() for path in (root / "assets/evidence").rglob("*") if path.is_file()
    }
    for name, text in (
        ("audit-data/findings.json", '{"half'),
        ("sweeps/tiny/rung-1.json", '{"half'),
        ("audit-data/findings.json", "5"),
    ):
        whole = (root / name).read_bytes()
        (root / name).write_text(text)
        assert (
            report.main(["journal", str(root)]) == 2 and Path(name).name in capsys.readouterr().err
        )
        (root / name).write_bytes(whole)
    write_json(root / "journal.yaml", read_yaml(root / "journal.yaml") | {"search": str(tmp_path)})
    assert report.main(["journal", str(root)]) == 2 and "plan.json" in capsys.readouterr().err
    assert {
        path: path.read_bytes() for path in (root / "assets/evidence").rglob("*") if path.is_file()
    } == before


def test_a_check_of_no_journal_is_refused(tmp_path, capsys):
    assert (
        report.main(["journal", str(tmp_path), "--check"]) == 2
        and "no JOURNAL.md yet" in capsys.readouterr().err
    )
    (tmp_path / "JOURNAL.md").write_text("# Ours\n")
    assert (
        report.main(["journal", str(tmp_path), "--check"]) == 2
        and "does not name the commit" in capsys.readouterr().err
    )
    (tmp_path / "JOURNAL.md").write_text(f"at commit `{'0' * 40}`\n")
    assert (
        report.main(["journal", str(tmp_path), "--check"]) == 2
        and "not in this clone" in capsys.readouterr().err
    )


def test_what_was_not_measured_names_a_target_that_there_is(tmp_path):
    journal.write_journal(tmp_path)
    text = (tmp_path / "JOURNAL.md").read_text()
    named = set(re.findall(r"\*\*Not measured yet\*\*: run `make ([\w-]+)", text))
    targets = set(re.findall(r"(?m)^([\w-]+):", (REPOSITORY / "Makefile").read_text()))
    if '"model"' not in (REPOSITORY / "audit.py").read_text():
        targets.add("audit-model")
    assert named <= targets and named >= {
        "train",
        "seeds",
        "sweep",
        "audit",
        "twin",
        "bench",
        "audit-model",
    }
    assert {path.name for path in tmp_path.rglob("*.png")} <= {
        "commits.png"
    } and journal.check_journal(tmp_path) == []


def test_runs_are_chosen_by_config_and_seed():
    def row(run, seed, lr=1, status="finished"):
        return {"run": run, "seed": seed, "lr": lr, "status": status}

    rows = [
        row("a", 1),
        row("b", 2),
        row("c", 3),
        row("d", 3),
        row("e", 1, 2),
        row("f", 2, 2),
        row("g", 3, 2, "dead"),
    ]
    assert [each["run"] for each in choose_seeds(rows, [])] == [
        "a",
        "b",
        "d",
    ], "the later run of a seed, and no third one of e, f"
    assert [each["run"] for each in choose_seeds([*rows, row("h", 4, 2)], [])] == [
        "e",
        "f",
        "h",
    ], "the newest"
    assert choose_seeds(rows[:2], []) == [] and choose_seeds(rows, ["a", "z"]) == []
    assert [each["run"] for each in choose_seeds(rows, ["g", "a"])] == ["g", "a"]


def test_runs_that_are_named_must_be_somewhere(copy):
    runs = sorted(path.name for path in (copy / "assets/evidence/seeds").iterdir())
    write_json(copy / "journal.yaml", read_yaml(copy / "journal.yaml") | {"runs": runs})
    journal.write_journal(copy)
    assert journal.check_journal(copy) == []
    write_json(
        copy / "journal.yaml", read_yaml(copy / "journal.yaml") | {"runs": [*runs[:2], "gone"]}
    )
    with pytest.raises(BadInput, match="names gone"):
        journal.write_journal(copy)


def test_words_come_from_the_team_and_numbers_never_do(tmp_path):
    path = tmp_path / "journal.yaml"
    for text, wrong in (
        ("answers: {metrics: 'AUC 0.951 is high'}", "0.951"),
        ("answers: {metrics: better by 3%}", "3%"),
        ("remark: 3,000 patches", "3,000"),
        ("remark: a drop of .95, in 1e-3 steps", ".95"),
        ("answers: {metrics: 10-fold}", "10"),
        ("sumary: x", "sumary"),
        ("answers: text", "answers must be names with values"),
        ("members: [Alice]", "a member is {name: ..., id: '...'}"),
        ("members: [{name: A, id: 0012345}]", "a member is {name: ..., id: '...'}"),
        ("answers: {metrics: [a, b]}", "the answer metrics must be text"),
        ("runs: [1]", "runs names run folders, not 1"),
        ("pictures: {damage: README.md}", "not damage: 'README.md'"),
        ("pictures: {damage: 5}", "not damage: 5"),
        ("pictures: {harm: a.png}", "not harm: 'a.png'"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=re.escape(wrong)):
            read_said(path)
    path.write_text("answers: {metrics: 'F2 and ROC-AUC, H&E, seed s1, SHA-256'}")
    assert read_said(path)
    said = read_said(REPOSITORY / "journal.yaml")
    keys = {key for questions in read_questions().values() for key, *_ in questions}
    assert set(said["answers"]) == keys and set(ANSWERS) <= keys


def test_patches_are_published_only_where_the_team_names_them(copy):
    write_json(copy / "journal.yaml", read_yaml(copy / "journal.yaml") | {"pictures": {}})
    journal.write_journal(copy)
    text = (copy / "JOURNAL.md").read_text()
    assert (
        "pictures/damage.png" not in text
        and text.count("Pictures are published only where journal.yaml names them") == 2
    )


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_opens_by_itself_without_an_error(made, tmp_path):
    page = (made / "journal.html").read_text()
    assert len(page) < 5_000_000
    probe = """<script>onload = () => {
      const heads = [...document.querySelectorAll("thead th")];
      const column = head => [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent);
      const auc = heads.find(head => head.textContent == "val_auc");
      auc.click(); const up = column(auc).map(Number); auc.click(); const down = column(auc).map(Number);
      document.body.dataset.found = JSON.stringify({
        images: document.images.length, links: document.links.length,
        broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
        lost: [...document.links].filter(a => a.hash ? !document.getElementById(a.hash.slice(1)) : !/^https/.test(a.href)),
        loaded: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^data:/.test(name)),
        up, down, aria: auc.ariaSort});
      console.log("probe ran"); }</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    options += [
        "--no-first-run",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
    ]
    command = [
        "chromium",
        *options,
        "--virtual-time-budget=5000",
        "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and "probe ran" in console[0], console
    found = json.loads(re.search(r'data-found="([^"]*)"', result.stdout)[1].replace("&quot;", '"'))
    assert (
        found["images"] >= 14 and not found["broken"] and not found["lost"] and not found["loaded"]
    )
    assert found["links"] > 40 and found["aria"] == "descending"
    assert (
        found["up"] == sorted(found["up"])
        and found["down"] == found["up"][::-1]
        and len(found["up"]) == 5
    )


@needs_git
def test_the_journal_of_this_repository_agrees_with_its_files():
    commit = journal.COMMIT.search((REPOSITORY / "JOURNAL.md").read_text())[1]
    if not git("cat-file", "-t", commit):
        pytest.skip("a shallow clone: it lacks the commit that the journal quotes")
    assert journal.check_journal(REPOSITORY) == []


def test_make_passes_the_check_on(copy):
    for check, code in (("1", 0), ("", 0)):
        command = [
            "make",
            "journal",
            f"PYTHON={sys.executable}",
            f"CHECK={check}",
            f"ARGS='{copy}'",
        ]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert ("num_differing" in result.stdout) == (check == "1")
