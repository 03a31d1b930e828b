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
from conftest import QUICK, REPOSITORY, run_script
from PIL import Image

import report
import train
from lib.command import BadInput
from lib.evidence import EVIDENCE, find_evidence, list_missing
from lib.files import file_digest, read_json, write_csv, write_json
from lib.report.journal import DIRECTIVE, END, check_journal, read_directives, write_journal
from lib.report.markdown import parse_markdown
from lib.report.quotes import find_code, git, read_code
from lib.report.start import TEMPLATE, start_journal
from lib.report.tables import build_table, read_rows, spread_text
from lib.runpage import mark_score

pytestmark = pytest.mark.slow

EXAMPLE = REPOSITORY / "assets" / "example" / "JOURNAL.md"
SMALL = [option for option in QUICK if not option.startswith("epochs=")]
TEXT = """# Our journal

Group: seven. Our AUC of <!-- value champion/summary.json val_auc digits=3 --> is high.

<!-- figure front -->

## 4 Dynamics

### Norms

They fall.

<!-- figure gradient-norm -->

<!-- table spikes -->

<!-- code lib/seeding.py:seed_everything -->

<!-- seeds -->

<!-- table champion rows=20 -->

<!-- table runs -->

<!-- table model-audit/scores.json:global -->

<!-- sources -->

Words at the end.
"""


def team_files(root, pcam_dir) -> None:
    """Three seeds, a champion from one of them, and the files of its audit that a journal reads."""
    for seed in (1, 2, 3):
        options = [f"data_dir={pcam_dir}", *SMALL, "epochs=1", f"seed={seed}"]
        assert train.main(["--runs", str(root / "runs"), *options]) == 0
    for path in root.glob("runs/*/meta.json"):
        # of one code, whatever is being worked at
        edit_json(path, commit=git("rev-parse", "HEAD").strip(), uncommitted_patch="")
    champion, audit = root / "assets" / "champion", root / "audit-model-pcam"
    first = sorted((root / "runs").iterdir())[0]
    shutil.copytree(first, champion, ignore=shutil.ignore_patterns("last.pt"))
    audit.mkdir()
    checkpoint = {"sha256": file_digest(champion / "best.pt"), "threshold": 0.3}
    data = read_json(champion / "meta.json")["data"]
    scores = {"auc": {"value": 0.6, "low": 0.5, "high": 0.7}}
    write_json(
        audit / "scores.json",
        {
            "checkpoint": checkpoint,
            "data": {"directory": str(pcam_dir), "sha256": data},
            "global": scores,
        },
    )
    errors = [["valid", row, row % 2, 0.9 - row / 100] for row in range(12)]
    write_csv(audit / "errors.csv", ("split", "index", "label", "probability"), errors)


@pytest.fixture(scope="module")
def filled(pcam_dir, tmp_path_factory):
    """A folder with a journal that is filled in, which no test may change."""
    root = tmp_path_factory.mktemp("team") / "our journal"
    team_files(root, pcam_dir)
    (root / "JOURNAL.md").write_text(TEXT)
    result = write_journal(root / "JOURNAL.md")
    assert result["missing"] == result["differing"] == []
    return root


@pytest.fixture
def team(filled, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(filled, tmp_path / "team")


def check(root) -> str:
    return "\n".join(check_journal(root / "JOURNAL.md"))


def edit_json(path, **changes) -> None:
    write_json(path, read_json(path) | changes)


def words_of(text: str) -> str:
    """What a team has written: a journal without directives and their content."""
    return re.sub(r"\s+", " ", DIRECTIVE.sub("", text))


# what is filled in


def test_a_filled_journal_agrees_with_its_files_and_stays_as_it_is(filled):
    text = (filled / "JOURNAL.md").read_text()
    assert check(filled) == ""
    write_journal(filled / "JOURNAL.md")
    assert (filled / "JOURNAL.md").read_text() == text
    assert words_of(text) == words_of(TEXT)


def test_the_numbers_are_those_of_the_runs(filled):
    text = (filled / "JOURNAL.md").read_text()
    summaries = [read_json(path) for path in sorted(filled.glob("runs/*/summary.json"))]
    auc = [summary["val_auc"] for summary in summaries]
    assert f"| ROC-AUC | {np.mean(auc):.3f} ± {np.std(auc, ddof=1):.3f} (95% interval" in text
    assert f"{auc[0]:.3f}" in text.split("is high")[0]
    assert "F2 at the stored threshold" in text and "n = 3" in text
    for run in (filled / "runs").iterdir():
        assert f"runs/{run.name}" in text, "the runs that were chosen stand in the directive"


def test_every_figure_and_every_source_is_there_with_its_digest(filled):
    text = (filled / "JOURNAL.md").read_text()
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(images) == 2 and all(image.startswith("assets/") for image in images)
    for image in images:
        Image.open(filled / image).verify()
    sources = re.findall(r"\| ([\w/.-]+) \| ([0-9a-f]{12}) \|", text.rpartition("<!-- sources")[2])
    assert len(sources) > 15
    for name, digest in sources:
        assert file_digest(filled / name).startswith(digest)


def test_the_page_shows_words_tables_and_figures_and_no_directive(filled):
    page = (filled / "journal.html").read_text()
    assert "Words at the end." in page and "<h1>Our journal</h1>" in page
    assert page.count("<img ") == 2 and page.count("<table") > 4
    assert "<!--" not in page and "end --&gt;" not in page


# what a check finds


def test_a_changed_digit_is_found_in_every_part_that_has_one(filled, tmp_path):
    text = (filled / "JOURNAL.md").read_text()
    (tmp_path / "team").symlink_to(filled)
    num_changed = 0
    for match in DIRECTIVE.finditer(text):
        digits = list(re.finditer(r"[1-9]", match["filled"]))
        if digits and match["kind"] != "figure":
            place = match.start("filled") + digits[-1].start()
            changed = text[:place] + ("8" if text[place] == "9" else "9") + text[place + 1 :]
            copy = filled / f"changed-{num_changed}.md"
            copy.write_text(changed)
            (sentence,) = check_journal(copy)
            copy.unlink()
            assert match["kind"] in sentence and "it says" in sentence
            num_changed += 1
    assert num_changed > 5


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda root: swap_checkpoint(root), "another checkpoint"),
        (lambda root: edit_meta(root, "runs/*-s2-*", commit="0" * 40), "commit and patch"),
        (lambda root: edit_meta(root, "runs/*-s2-*", uncommitted_patch="+x"), "commit and patch"),
        (lambda root: edit_meta(root, "runs/*-s2-*", data={"x": "0"}), "data is"),
        (lambda root: edit_meta(root, "assets/champion", data={"x": "0"}), "another data"),
        (lambda root: foreign_champion(root), "another team's"),
        (lambda root: (root / "audit-model-pcam/scores.json").write_text("{"), "not valid JSON"),
        (lambda root: (root / "audit-model-pcam/errors.csv").unlink(), "errors.csv"),
        (lambda root: Image.new("RGB", (9, 9)).save(root / "assets/journal/front.png"), "drawn"),
        (lambda root: (root / "assets/journal/front.png").unlink(), "drawn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_check_names_what_does_not_belong_together(change, told, team, capsys):
    change(team)
    assert report.main(["journal", str(team / "JOURNAL.md"), "--check"]) == 1
    out, err = capsys.readouterr()
    assert told in err and json.loads(out.splitlines()[-1])["num_differing"] > 0


def edit_meta(root, pattern: str, **changes) -> None:
    (run,) = root.glob(pattern)
    edit_json(run / "meta.json", **changes)


def swap_checkpoint(root) -> None:
    (other,) = root.glob("runs/*-s2-*")
    shutil.copy(other / "best.pt", root / "assets" / "champion")


def foreign_champion(root) -> None:
    shutil.rmtree(root / "assets" / "champion")
    shutil.copytree(REPOSITORY / "assets" / "champion", root / "assets" / "champion")


def test_the_champion_of_the_repository_is_shown_to_no_team(team):
    foreign_champion(team)
    write_journal(team / "JOURNAL.md")
    text = (team / "JOURNAL.md").read_text()
    weights = read_json(REPOSITORY / "assets/champion/summary.json")["weights_sha256"]
    assert weights[:12] not in text and "make champion" in text


def test_seeds_of_different_code_are_not_averaged(team):
    edit_meta(team, "runs/*-s3-*", commit="1" * 40)
    result = write_journal(team / "JOURNAL.md")
    assert any("not averaged" in sentence for sentence in result["differing"])
    assert "±" not in re.search(r"<!-- seeds.*?<!-- end -->", read(team), re.DOTALL)[0]


def read(root) -> str:
    return (root / "JOURNAL.md").read_text()


def test_code_that_was_changed_without_a_commit_is_not_quoted(team):
    for run in (team / "runs").iterdir():
        patch = "diff --git a/lib/seeding.py b/lib/seeding.py\n+x"
        edit_json(run / "meta.json", uncommitted_patch=patch)
    assert "uncommitted changes of lib/seeding.py" in check(team)


def test_a_score_below_its_constant_answer_is_marked_wherever_it_is_shown(team):
    for path in [*team.glob("runs/*/summary.json"), team / "assets/champion/summary.json"]:
        edit_json(path, val_auc=0.4, val_loss=0.9)
    write_journal(team / "JOURNAL.md")
    assert read(team).count("worse than the constant answer, 0.5)") == 7, (
        "in the sentence, over seeds, of the champion, and of each of four runs"
    )
    assert read(team).count("worse than the constant answer, 0.69") == 2
    assert mark_score("val_f2", 0.8, {"always_positive_f2": 0.8}) == 0.8
    assert mark_score("num", 0.1, {"constant_auc": 0.5}) == 0.1


# which files are meant


def test_several_sets_of_seeds_are_named_and_none_is_chosen(team):
    (team / "JOURNAL.md").write_text("<!-- seeds -->\n")
    for run in list((team / "runs").iterdir()):
        copy = team / "runs" / f"{run.name}-other"
        shutil.copytree(run, copy)
        config = yaml.safe_load((copy / "config.yaml").read_text()) | {"lr": 0.5}
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
    (missing,) = write_journal(team / "JOURNAL.md")["missing"]
    assert missing.count("runs/") == 6 and "±" not in read(team)


def test_trials_of_a_search_and_runs_that_go_on_are_no_seeds(team):
    (team / "JOURNAL.md").write_text("<!-- seeds -->\n")
    for run in (team / "runs").iterdir():
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"name": "space-7eed90-base"}))
    assert "make seeds" in write_journal(team / "JOURNAL.md")["missing"][0]
    for run in (team / "runs").iterdir():
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"name": "x"}))
        (run / "summary.json").unlink()
    assert "make seeds" in write_journal(team / "JOURNAL.md")["missing"][0]


def test_an_unfinished_search_is_not_shown_as_a_result(team):
    (team / "sweeps" / "s").mkdir(parents=True)
    write_json(team / "sweeps" / "s" / "plan.json", {"ranges": {"lr": {"log": [1, 2]}}})
    text = "<!-- table search/plan.json:ranges -->\n<!-- table sweeps/s/plan.json:ranges -->\n"
    (team / "JOURNAL.md").write_text(text + "<!-- table champion -->\n")
    result = write_journal(team / "JOURNAL.md")
    assert "make sweep" in result["missing"][0] and "s is not finished" in result["differing"][0]
    (run,) = team.glob("runs/*-s2-*")
    write_json(team / "sweeps" / "s" / "champion.json", {"run": f"runs/{run.name}"})
    (sentence,) = write_journal(team / "JOURNAL.md")["differing"]
    assert f"assets/champion is not runs/{run.name}" in sentence


# the empty journal, and an earlier one


def test_an_empty_journal_says_what_is_missing_and_which_command_makes_it(tmp_path, capsys):
    path = tmp_path / "JOURNAL.md"
    assert report.main(["journal", str(path)]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    missing = " ".join(result["missing"])
    for piece in EVIDENCE:
        assert f"run `{piece.command}`" in missing
    assert err.count("missing:") == len(EVIDENCE) and result["differing"] == []
    text = path.read_text()
    path.write_text(text.replace("Group: to be filled in", "Group: seven, 0.123"))
    assert report.main(["journal", str(path)]) == 0
    assert path.read_text() == text.replace("Group: to be filled in", "Group: seven, 0.123")
    assert report.main(["journal", str(path), "--check"]) == 0
    assert "assets/champion" not in {match for match in re.findall(r"assets/\w+", text) if END}


def test_every_question_has_its_place():
    sections = re.findall(r"(?m)^## ([\d.]+) ", TEMPLATE.read_text())
    assert sections == ["1", "2", "3", "4", "5.1", "5.2", "6", "7", "8", "9"]
    numbers = {number for piece in EVIDENCE for number in piece.questions.split(", ")}
    assert numbers <= set(sections)
    assert len(read_directives(TEMPLATE.read_text())) > 40


def test_commands_that_are_named_are_targets_of_make():
    targets = set(re.findall(r"(?m)^([\w-]+):", (REPOSITORY / "Makefile").read_text()))
    named = {piece.command.split()[1] for piece in EVIDENCE}
    assert named <= targets


def test_a_journal_yaml_is_converted_once(tmp_path):
    made = "Made by `report.py journal` from the files that it names"
    (tmp_path / "JOURNAL.md").write_text(made)
    values = {
        "group": "seven",
        "repository": "https://example.org/a",
        "members": [{"name": "Ada", "id": "0012345"}],
        "runs": ["a", "b"],
        "audit": "audit-x",
        "answers": {"metrics": "We chose \\1 two.", "unknown": "Kept as well."},
    }
    (tmp_path / "journal.yaml").write_text(yaml.safe_dump(values))
    assert start_journal(tmp_path / "JOURNAL.md")
    text = (tmp_path / "JOURNAL.md").read_text()
    for words in ("Group: seven", "https://example.org/a", "- Ada (0012345)", "Kept as well."):
        assert words in text
    assert "<!-- seeds runs/a runs/b -->" in text and "table audit-x/findings.json" in text
    assert "We chose \\1 two." in text.split("### Two metrics, and why")[1].split("###")[0]
    assert (tmp_path / "JOURNAL.md.old").read_text() == made
    assert (tmp_path / "journal.yaml.old").is_file() and not start_journal(tmp_path / "JOURNAL.md")


def test_a_journal_of_the_team_is_not_converted(tmp_path):
    (tmp_path / "JOURNAL.md").write_text("# Ours\n")
    (tmp_path / "journal.yaml").write_text("group: x\n")
    assert not start_journal(tmp_path / "JOURNAL.md")
    assert (tmp_path / "JOURNAL.md").read_text() == "# Ours\n"


# directives


@pytest.mark.parametrize(
    "wrong, told",
    [
        ("table", "takes 1 to 2 names"),
        ("table a.csv colums=a", "did you mean 'columns'"),
        ("value a.json", "takes 2 to 2 names"),
        ("figure 'open", "No closing quotation"),
        ("sources x", "takes 0 to 0 names"),
    ],
)
def test_a_wrong_directive_is_named_with_its_line(wrong, told, tmp_path, capsys):
    (tmp_path / "JOURNAL.md").write_text(f"# A\n\n<!-- {wrong} -->\n")
    assert report.main(["journal", str(tmp_path / "JOURNAL.md")]) == 2
    err = capsys.readouterr().err
    assert "line 3" in err and told in err


def test_a_part_without_its_end_loses_no_words(tmp_path):
    path = tmp_path / "JOURNAL.md"
    path.write_text("a <!-- value x.json y --> b\n\n<!-- table spikes -->\n\nwords\n")
    write_journal(path)
    path.write_text(path.read_text().replace(END, "", 1))
    write_journal(path)
    assert " b\n" in path.read_text() and "words" in path.read_text()


class Files:
    """Files of a journal, without the rules of what belongs together."""

    def __init__(self, root):
        self.root = root

    def resolve(self, name):
        return name

    def csv(self, name):
        with open(self.root / name) as file:
            header, *lines = file.read().splitlines()
        return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]

    def document(self, name):
        return json.loads((self.root / name).read_text())


def test_a_table_shows_the_rows_and_columns_that_are_asked_for(tmp_path):
    write_csv(tmp_path / "a.csv", ("name", "n", "auc"), [[f"r{n}", n, n / 20] for n in range(20)])
    files = Files(tmp_path)
    table, more = build_table(files, "a.csv", {})
    assert len(table.rows) == 8 and "12 more" in more.text
    (table,) = build_table(
        files, "a.csv", {"where": ["n>10"], "sort": "-n", "columns": "n,name", "rows": "9"}
    )
    assert [row[0] for row in table.rows] == list(range(19, 10, -1)) and table.rows[0][1] == "r19"
    (table,) = build_table(files, "a.csv", {"only": "r3,r1", "columns": "auc"})
    assert "0.15 **(worse" in table.rows[0][0] and len(table.rows) == 2
    with pytest.raises(BadInput, match="did you mean 'auc'"):
        build_table(files, "a.csv", {"columns": "aud"})
    write_json(tmp_path / "a.json", {"a": {"b": {"x": {"v": 1}, "y": {"v": 2}}}})
    assert read_rows(files, "a.json", "a.b")[0] == [{"name": "x", "v": 1}, {"name": "y", "v": 2}]
    with pytest.raises(BadInput, match="has no a.c"):
        read_rows(files, "a.json", "a.c")


def test_an_interval_stays_within_what_is_possible():
    text = spread_text([0.99, 1.0, 0.95], "val_auc", {"constant_auc": 0.5})
    assert text.startswith("0.980 ± 0.026 (95% interval 0.914 to 1.000, n = 3)")


# code and history


def test_code_is_found_by_name():
    text = "import x\n\n# why\n@x.y\ndef f(a):\n    return a\n\nA, B = 1, 2\nC = {\n 1,\n}\n"
    assert find_code("a.py", text, "f") == (3, "# why\n@x.y\ndef f(a):\n    return a")
    assert find_code("a.py", text, "C") == (9, "C = {\n 1,\n}")
    assert find_code("a.py", text, "g") == (0, "")
    assert find_code("a.yml", "on:\n  push:\n\n  pull:\njobs:\n", "on:") == (
        1,
        "on:\n  push:\n\n  pull:",
    )


@pytest.mark.skipif(not git("rev-parse", "HEAD"), reason="needs the repository's history")
def test_the_example_agrees_with_its_files_and_its_code():
    text = EXAMPLE.read_text()
    if not git("cat-file", "-t", "12996bf33efd"):
        pytest.skip("a shallow clone: it lacks the commit that the example quotes")
    assert check_journal(EXAMPLE) == []
    quotes = re.findall(r"(?s)`([\w./]+):(\d+) at ([0-9a-f]{10})`:\n\n````\n(.*?)\n````", text)
    for file, line, commit, code in quotes:
        lines = code.splitlines()
        assert read_code(commit, file).splitlines()[int(line) - 1 :][: len(lines)] == lines
    assert len(quotes) > 6


def test_nothing_of_the_example_is_read_for_a_team(tmp_path):
    write_journal(new_journal(tmp_path))
    journal = (tmp_path / "JOURNAL.md").read_text()
    for run in (EXAMPLE.parent / "runs").iterdir():
        assert run.name not in journal


def new_journal(root):
    start_journal(root / "JOURNAL.md")
    return root / "JOURNAL.md"


# the page


def test_markdown_becomes_blocks(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    text = (
        "## A\n\n### B\nwords *of* **ours**\nand `more`\n\n- one\n  goes on\n- two\n\n1. first\n\n"
        "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n\n![t](a.png)\n\n*t.*\n\n"
        "````\n<!-- kept -->\n\n# no heading\n````\n\n<!-- gone -->\n"
    )
    kinds = [type(block).__name__ for block in parse_markdown(text, tmp_path)]
    assert kinds == ["Heading", "Heading", "Words", "Items", "Items", "Table", "Figure", "Code"]
    html = "".join(block.to_html() for block in parse_markdown(text, tmp_path))
    for part in (
        "<i>of</i>",
        "<b>ours</b>",
        "<li>one goes on</li>",
        "<ol>",
        ">x|y<",
        "# no heading",
    ):
        assert part in html
    assert "&lt;!-- kept --&gt;" in html and "gone" not in html


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_of_the_page_is_cut(filled, tmp_path, width):
    page = (filled / "journal.html").read_text()
    probe = """<script>onload = () => document.body.dataset.found = JSON.stringify({
        page: document.documentElement.scrollWidth, window: innerWidth,
        broken: [...document.images].filter(image => !image.naturalWidth).length,
        lost: [...document.links].filter(a => a.hash && !document.getElementById(a.hash.slice(1))).length})
        </script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options += [f"--window-size={width},2000", "--virtual-time-budget=5000", "--dump-dom"]
    command = ["chromium", *options, (tmp_path / "page.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'data-found="([^"]*)"', result.stdout)[1].replace("&quot;", '"'))
    assert found["page"] <= found["window"] and not found["broken"] and not found["lost"]


def test_the_assignment_names_each_piece_of_evidence_and_the_next_command():
    listed = run_script("report.py", "assignment", check=0)
    missing = list_missing(REPOSITORY)
    assert listed.json["num_missing"] == len(missing)
    assert all(piece.what in listed.stderr for piece in EVIDENCE)
    assert listed.json["next"] == (missing[0]["command"] if missing else "make journal")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- value a.json x --> words\n\nan hour of work\n\n<!-- end -->\n",
        "words\n\n<!-- end -->\n",
        "<!-- table runs -->\n\nan hour of work\n\n<!-- tabel spikes -->\n\n| a |\n\n<!-- end -->\n",
        "<!--table champion-->\n",
    ],
)
def test_words_are_not_lost_to_a_leftover_end_or_a_misspelt_directive(text, tmp_path):
    path = tmp_path / "JOURNAL.md"
    path.write_text(f"# J\n\n{text}")
    with pytest.raises(BadInput, match="line"):
        write_journal(path)
    assert path.read_text() == f"# J\n\n{text}"


def test_a_run_that_is_gone_is_named(tmp_path):
    path = tmp_path / "JOURNAL.md"
    path.write_text("# J\n\n<!-- seeds runs/a-s1-0000 runs/a-s2-0000 -->\n")
    assert any(
        "there is no run runs/a-s1-0000" in text for text in write_journal(path)["differing"]
    )


def test_the_same_seed_twice_and_a_part_of_an_audit_are_no_evidence(tmp_path):
    for name in ("runs/a-s1-0000", "runs/a-s1-0001", "runs/a-s2-0000"):
        (tmp_path / name).mkdir(parents=True)
        write_json(tmp_path / name / "summary.json", {})
    for name in ("audit-x", "audit-part-x", "audit-groups-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "quarantine.csv").touch()
    assert len(find_evidence(tmp_path, "seeds")) == 2
    assert [folder.name for folder in find_evidence(tmp_path, "data-audit")] == ["audit-x"]
