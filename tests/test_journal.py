"""A journal is a team's own text: what its directives ask for comes from the team's files, and a
check names what they no longer say.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from PIL import Image

import report
from lib.command import BadInput
from lib.evidence import EVIDENCE, find_evidence, list_missing
from lib.files import file_digest, read_json, write_csv, write_json
from lib.report.evidence import Evidence, git
from lib.report.journal import (
    DIRECTIVE,
    TEMPLATE,
    check_journal,
    write_journal,
)
from lib.report.tables import build_table

pytestmark = pytest.mark.slow

EXAMPLE = REPOSITORY / "assets" / "example" / "JOURNAL.md"
RUN = EXAMPLE.parent / "runs" / "20261123T172959Z-proof-7eed90-base-s2-0bdf"
TEXT = """# Our journal

Group: seven. Our AUC of <!-- value champion/summary.json val_auc digits=3 --> is high.

<!-- figure front -->

## 4 Dynamics

### Norms

They fall.

<!-- figure gradient-norm -->

<!-- code lib/seeding.py:seed_everything -->

<!-- seeds -->

<!-- table champion -->

<!-- table runs -->

<!-- table model-audit/scores.json:global -->

<!-- sources -->

Words at the end.
"""


def edit_json(path, **changes) -> None:
    write_json(path, read_json(path) | changes)


def edit_config(run, **changes) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | changes))


def runs_of(root) -> list:
    return sorted((root / "runs").iterdir())


@pytest.fixture(scope="module")
def filled(pcam_dir, tmp_path_factory):
    """A folder with three seeds, a champion from one of them, the files of its audit, and a journal
    that is filled in, which no test may change.
    """
    root = tmp_path_factory.mktemp("team") / "our journal"
    # of one code, whatever is being worked at
    code = {"commit": git("rev-parse", "HEAD").strip(), "uncommitted_patch": ""}
    for seed in (1, 2, 3):
        run = root / "runs" / f"20260101T00000{seed}Z-quick-s{seed}-000{seed}"
        shutil.copytree(RUN, run)
        edit_config(run, seed=seed, name="quick")
        (run / "best.pt").write_text(f"checkpoint {seed}")
        edit_json(run / "meta.json", **code)
        edit_json(run / "summary.json", weights_sha256=f"{seed:064}", val_auc=0.9 + seed / 100)
    champion = root / "assets" / "champion"
    audit = root / "audit-model-pcam"
    shutil.copytree(run, champion)
    audit.mkdir()
    scores = {
        "checkpoint": {"sha256": file_digest(champion / "best.pt"), "threshold": 0.3},
        "data": {"directory": str(pcam_dir), "sha256": read_json(champion / "meta.json")["data"]},
        "global": {"auc": {"value": 0.6, "low": 0.5, "high": 0.7}},
    }
    write_json(audit / "scores.json", scores)
    errors = [("valid", row, 0.9, f"false {row % 2}", 1 + row // 2) for row in range(6)]
    write_csv(audit / "errors.csv", ("split", "index", "probability", "kind", "rank"), errors)
    result = refill(root, TEXT)
    assert result["missing"] == result["differing"] == []
    return root


@pytest.fixture
def team(filled, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(filled, tmp_path / "team")


def refill(root, text=None) -> dict:
    """Fill in the journal of a folder, after replacing its text."""
    if text:
        (root / "JOURNAL.md").write_text(text)
    return write_journal(root / "JOURNAL.md")


def read(root) -> str:
    return (root / "JOURNAL.md").read_text()


# what is filled in


def test_a_filled_journal_says_what_its_files_say(filled):
    text = read(filled)
    auc = [read_json(run / "summary.json")["val_auc"] for run in runs_of(filled)]
    assert f"| ROC-AUC | {np.mean(auc):.3f} ± {np.std(auc, ddof=1):.3f} (95% interval" in text
    assert f"{auc[-1]:.3f}<!-- end --> is high" in text and "n = 3" in text
    for run in runs_of(filled):
        assert f"runs/{run.name}" in text, "the runs that were chosen stand in the directive"
    sources = re.findall(r"\| ([\w/.-]+) \| ([0-9a-f]{12}) \|", text.rpartition("<!-- sources")[2])
    assert len(sources) > 15
    for name, digest in sources:
        assert file_digest(filled / name).startswith(digest)
    page = (filled / "journal.html").read_text()
    assert "Words at the end." in page and "<h1>Our journal</h1>" in page
    assert page.count("<img ") == 2 and page.count("<table") > 4 and "<!--" not in page
    refill(filled)
    assert read(filled) == text
    assert report.main(["journal", str(filled / "JOURNAL.md"), "--check"]) == 0
    words = [re.sub(r"\s+", " ", DIRECTIVE.sub("", journal)) for journal in (text, TEXT)]
    assert words[0] == words[1], "the team's own"


def change_last_digit(match) -> str:
    """A directive that is filled in with another digit than before."""
    if match["kind"] == "figure":
        return match[0]
    head, digit, tail = re.fullmatch(r"(?s)(.*)([1-9])(.*?)", match[0]).groups()
    return f"{head}{int(digit) % 9 + 1}{tail}"


def test_a_changed_digit_is_found_in_every_part_that_has_one(filled):
    copy = filled / "changed.md"
    copy.write_text(DIRECTIVE.sub(change_last_digit, read(filled)))
    differing = check_journal(copy)["differing"]
    assert all("it says" in sentence for sentence in differing)
    kinds = [match["kind"] for match in DIRECTIVE.finditer(read(filled))]
    assert len(differing) == len(kinds) - kinds.count("figure") > 5


def swap_checkpoint(root) -> None:
    shutil.copy(runs_of(root)[1] / "best.pt", root / "assets" / "champion")


def patch_code(root) -> None:
    patch = "diff --git a/lib/seeding.py b/lib/seeding.py\n+x"
    edit_json(runs_of(root)[1] / "meta.json", uncommitted_patch=patch)


def foreign_champion(root) -> None:
    shutil.rmtree(root / "assets" / "champion")
    shutil.copytree(REPOSITORY / "assets" / "champion", root / "assets" / "champion")


DISAGREEMENTS = {
    "another checkpoint": swap_checkpoint,
    "another code": patch_code,
    "uncommitted changes of lib/seeding.py": patch_code,
    "another data": lambda root: edit_json(root / "assets/champion/meta.json", data={"x": "0"}),
    "a champion from a run of this checkout": foreign_champion,
    "is not valid JSON": lambda root: (root / "audit-model-pcam/scores.json").write_text("{"),
    "audit-model-pcam/errors.csv": lambda root: (root / "audit-model-pcam/errors.csv").unlink(),
    "front.png was drawn from": lambda root: Image.new("RGB", (9, 9)).save(
        root / "assets/journal/front.png"
    ),
    "there is no run": lambda root: shutil.rmtree(runs_of(root)[2]),
}


@pytest.mark.parametrize("sentence", DISAGREEMENTS)
def test_a_check_names_what_does_not_belong_together(sentence, team, capsys):
    DISAGREEMENTS[sentence](team)
    assert report.main(["journal", str(team / "JOURNAL.md"), "--check"]) == 1
    out, err = capsys.readouterr()
    assert sentence in err and json.loads(out.splitlines()[-1])["num_differing"] > 0


def test_nothing_of_another_team_or_another_code_is_shown(team):
    foreign_champion(team)
    edit_json(runs_of(team)[2] / "meta.json", commit="1" * 40)
    differing = refill(team)["differing"]
    assert any("not averaged" in sentence for sentence in differing)
    assert "±" not in re.search(r"<!-- seeds.*?<!-- end -->", read(team), re.DOTALL)[0]
    weights = read_json(REPOSITORY / "assets/champion/summary.json")["weights_sha256"]
    assert weights[:12] not in read(team) and "make champion" in read(team)


def test_a_score_below_its_constant_answer_is_marked_wherever_it_is_shown(team):
    for path in [*team.glob("runs/*/summary.json"), team / "assets/champion/summary.json"]:
        edit_json(path, val_auc=0.4, val_loss=0.9)
    edit_json(team / "audit-model-pcam" / "scores.json", **{"global": {"auc": {"value": 0.4}}})
    refill(team)
    assert read(team).count("worse than the constant answer, 0.69") == 2
    # in the sentence, over seeds, of the champion, in its audit, of each of four runs
    assert read(team).count("worse than the constant answer, 0.5)") == 8


# which files are meant


def test_seeds_are_finished_runs_of_one_set_and_no_trials_of_a_search(team):
    for run in runs_of(team):
        edit_config(shutil.copytree(run, run.with_name(f"{run.name}-other")), lr=0.5)
    (missing,) = refill(team, "<!-- seeds -->\n")["missing"]
    assert missing.count("runs/") == 6 and "±" not in read(team), "two sets to choose from"
    for run in runs_of(team):
        edit_config(run, name="space-7eed90-base")
    assert "make seeds" in refill(team)["missing"][0]


def test_an_unfinished_search_is_not_shown_as_a_result(team):
    search = team / "sweeps" / "s"
    search.mkdir(parents=True)
    write_json(search / "plan.json", {"ranges": {"lr": {"log": [1, 2]}}})
    text = "<!-- table search/plan.json -->\n<!-- table sweeps/s/plan.json -->\n<!-- table champion -->"
    result = refill(team, text)
    assert "make sweep" in result["missing"][0] and "s is not finished" in result["differing"][0]
    write_json(search / "champion.json", {"run": f"runs/{runs_of(team)[1].name}"})
    (sentence,) = refill(team)["differing"]
    assert "assets/champion is not runs/" in sentence
    # an audit of a part is no evidence
    for name in ("audit-x", "audit-part-x", "audit-groups-x"):
        (team / name).mkdir()
        (team / name / "quarantine.csv").touch()
    assert [folder.name for folder in find_evidence(team, "data-audit")] == ["audit-x"]


# the empty journal, and an earlier one


def test_an_empty_journal_says_what_is_missing_and_which_command_makes_it(tmp_path, capsys):
    path = tmp_path / "JOURNAL.md"
    assert report.main(["journal", str(path)]) == 0
    err = capsys.readouterr().err
    for piece in EVIDENCE:
        assert f"run `{piece.command}`" in err
    own = path.read_text().replace("Group: to be filled in", "Group: seven, 0.123")
    path.write_text(own)
    assert report.main(["journal", str(path)]) == 0 and path.read_text() == own
    assert report.main(["journal", str(path), "--check"]) == 0
    # on the data that the team has trained on
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text("data_dir: data/our own\n")
    assert "DATA='data/our own'" in list_missing(tmp_path)[0]["command"]


def test_every_question_has_its_place_and_every_command_is_a_target_of_make():
    sections = re.findall(r"(?m)^## ([\d.]+) ", TEMPLATE.read_text())
    assert sections == ["1", "2", "3", "4", "5.1", "5.2", "6", "7", "8", "9"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for piece in EVIDENCE:
        assert set(piece.questions.split(", ")) <= set(sections)
        assert f"\n{piece.command.split()[1]}:" in makefile


# directives


WRONG = {
    "<!-- table -->": "missing a required argument",
    "<!-- table a.csv colums=a -->": "unexpected keyword argument 'colums'",
    "<!-- figure 'open -->": "No closing quotation",
    "<!--table champion-->": "is no directive",
    "<!-- tabel runs -->\n\n| a |": "is no directive",
    "an hour of work\n\n<!-- end -->": "an end without one",
    "<!-- value a.json x --> words\n\nan hour of work\n\n<!-- end -->": "where the value ends",
}


def test_a_wrong_directive_is_named_with_its_line_and_no_words_are_lost(tmp_path, capsys):
    path = tmp_path / "JOURNAL.md"
    for wrong, sentence in WRONG.items():
        path.write_text(f"# A\n\n<!-- todo: this is a note -->\n{wrong}\n")
        assert report.main(["journal", str(path)]) == 2
        err = capsys.readouterr().err
        assert re.search(r"line [46]", err) and sentence in err
        assert wrong in path.read_text() and len(list(tmp_path.iterdir())) == 1


def test_a_table_shows_the_rows_and_columns_that_are_asked_for(tmp_path):
    write_csv(tmp_path / "a.csv", ("name", "n", "auc"), [[f"r{n}", n, n / 20] for n in range(20)])
    write_json(tmp_path / "a.json", {"a": {"b": {"x": {"v": 1}, "y": {"v": 2}}}, "n": 3})

    def rows_of(source, **options):
        return build_table(Evidence(tmp_path), source, **options)[0].rows

    assert len(rows_of("a.csv")) == 8
    rows = rows_of("a.csv", where=["n>10"], sort="-n", columns="n,name", rows="9")
    assert [row[0] for row in rows] == list(range(19, 10, -1)) and rows[0][1] == "r19"
    assert rows_of("a.json:a.b") == [["x", 1], ["y", 2]]
    assert rows_of("a.json", columns="n") == [[3]]
    with pytest.raises(BadInput, match="did you mean 'auc'"):
        rows_of("a.csv", columns="aud")
    with pytest.raises(BadInput, match=r"has no a\.c"):
        rows_of("a.json:a.c")


# code and history


@pytest.mark.skipif(
    not git("cat-file", "-t", "12996bf33efd"),
    reason="needs the history, up to the commit that the example quotes",
)
def test_the_example_agrees_with_its_files_and_its_code():
    assert check_journal(EXAMPLE)["differing"] == []
    assert EXAMPLE.read_text().count(" at 12996bf33e`:") > 6, "quoted code"


# the page


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_nothing_of_the_page_is_cut_on_a_phone(filled, tmp_path):
    page = (filled / "journal.html").read_text()
    probe = """<script>onload = () => document.title = JSON.stringify({
        page: document.documentElement.scrollWidth, window: innerWidth,
        broken: [...document.images].filter(image => !image.naturalWidth).length})</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options += ["--window-size=390,2000", "--virtual-time-budget=5000", "--dump-dom"]
    command = ["chromium", *options, (tmp_path / "page.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    facts = json.loads(re.search("<title>(.*?)</title>", result.stdout)[1])
    assert facts["page"] <= facts["window"] and not facts["broken"]


def test_the_assignment_names_each_piece_of_evidence_and_the_next_command(capsys):
    assert report.main(["assignment"]) == 0
    out, err = capsys.readouterr()
    commands = [row["command"] for row in list_missing(REPOSITORY)]
    result = {"num_missing": len(commands), "next": [*commands, "make journal"][0]}
    assert json.loads(out.splitlines()[-1]) == result
    assert all(piece.what in err for piece in EVIDENCE)
