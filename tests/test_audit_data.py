"""The audit of data: each kind of damage is found, nothing else is, and damaged files become
findings, not crashes.
"""

import dataclasses
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import QUICK, draw_patches, run_script, write_pcam
from damaged import score_quarantine, write_damaged_edition

from audit import main
from lib.audit.data import duplicates, labels, triggers, unusual
from lib.audit.data import run as data
from lib.audit.data.balance import check_balance
from lib.audit.data.drift import check_drift
from lib.audit.data.leakage import measure_unit
from lib.audit.survey import Survey, survey_folder
from lib.config import load_config
from lib.features import NAMES
from lib.files import read_csv, read_json
from lib.groups import group_of_rows, write_groups
from lib.pcam import open_split, split_path
from lib.prepare.synthetic import SyntheticPlan, draw_slide, write_synthetic
from lib.splitwriter import SplitWriter, write_meta

QUICK_CHECKS = ("files", "values", "balance", "duplicates", "leakage", "drift")
PACKED = {"chunks": (8, 96, 96, 3), "compression": "gzip"}


def audit(folder, out, checks=QUICK_CHECKS, **options) -> tuple[dict, list[dict], list[dict]]:
    """The result, the findings and the quarantine of an audit."""
    result = data.audit_data(folder, out, checks, [], **options)
    return result, read_findings(out), read_csv(out / "quarantine.csv")


def read_findings(out) -> list[dict]:
    return json.loads((out / "findings.json").read_text())


def write_split(folder, split, patches, known, dtype=np.float32, **storage) -> Path:
    folder.mkdir(exist_ok=True)
    with SplitWriter(folder, split, len(patches), dtype, **storage) as writer:
        writer.add(patches.astype(dtype), known)
    return folder


def of_check(findings, check) -> list[dict]:
    return [row for row in findings if row["check"] == check and row["severity"] != "note"]


def listed(quarantine, *reasons) -> set[tuple]:
    """Split and row of the suspects of some reasons."""
    rows = [row for row in quarantine if row["reason"] in reasons]
    return {(row["split"], int(row["index"])) for row in rows}


@pytest.fixture(scope="module")
def slides_dir(tmp_path_factory):
    """Synthetic slides with everything planted that metadata can tell."""
    plants = {"exact": 0.05, "symmetric": 0.05, "shared_slides": 1.0, "trigger": 0.1}
    folder = tmp_path_factory.mktemp("slides") / "data"
    write_synthetic(SyntheticPlan({"train": 360, "valid": 180}, 2, plants), folder)
    return folder


@pytest.fixture(scope="module")
def slides_surveys(slides_dir, tmp_path_factory):
    return survey_folder(slides_dir, tmp_path_factory.mktemp("work"))[0]


def test_the_damaged_edition_is_found_exactly_and_an_earlier_audit_is_cleared_away(
    pcam_dir, tmp_path
):
    out = tmp_path / "out"
    truth = write_damaged_edition(pcam_dir, tmp_path / "data", 80)
    result, findings, quarantine = audit(tmp_path / "data", out)
    for reason in ("black", "white", "nan", "range"):
        scores = score_quarantine(truth, quarantine, reason)
        assert scores["planted"] > 0 and scores["recall"] == scores["precision"] == 1, scores
    assert len(quarantine) == len(truth)
    assert result["num_errors"] and not result["not_run"]
    (balance,) = [row for row in of_check(findings, "balance") if row["split"] == "train"]
    assert [row["count"] for row in balance["rows"]] == [67, 13], "five to one is worth a warning"
    assert "repacked" in of_check(findings, "size")[0]["measured"]
    (out / ".work.killed").mkdir()
    assert (out / "values_nan.csv").exists()
    audit(pcam_dir, out, ("values",))
    pictures = {"counts.png", "histograms.png"}
    texts = {"audit.html", "findings.json", "histograms.csv", "quarantine.csv"}
    assert {path.name for path in out.iterdir()} == pictures | texts


SPOILED = (
    ("nan", lambda patch: np.where(np.arange(96)[:, None, None] == 95, np.inf, patch)),
    ("nan", lambda patch: patch * np.nan),
    ("range", lambda patch: patch - 300),
    ("range", lambda patch: patch / 255 * 4 - 2),
    ("scaled", lambda patch: patch / 255),
    ("scaled", lambda patch: patch / 127.5 - 1),
    ("black", lambda patch: patch * 0),
    ("white", lambda patch: patch * 0 + 255),
    ("constant", lambda patch: patch * 0 + np.array([200, 100, 150])),
    ("flat", lambda patch: np.rint(patch * 0.05) + 180),
    ("partial", lambda patch: patch * (np.arange(96)[:, None, None] >= 16)),
)


def test_each_kind_of_damage_has_its_reason_and_leaves_the_others_alone(tmp_path):
    patches, known = draw_patches(40, 3)
    patches = patches.astype(np.float64)
    for row, (_, spoil) in enumerate(SPOILED):
        patches[row] = spoil(patches[row])
    patches[33] = patches[32] / 255  # a scaled copy is still a copy
    patches[34] = patches[32] / 127.5 - 1
    known[[33, 34]] = known[32]
    write_split(tmp_path / "data", "train", patches, known)
    write_split(tmp_path / "data", "valid", *draw_patches(30, 4))
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", ("values", "duplicates"))
    reasons = {
        int(row["index"]): row["reason"] for row in quarantine if row["reason"] != "duplicate"
    }
    expected = dict(enumerate(reason for reason, _ in SPOILED))
    assert reasons == expected | dict.fromkeys((33, 34), "scaled")
    assert listed(quarantine, "duplicate") == {("train", 33), ("train", 34)}
    (nan,) = of_check(findings, "values: nan")
    assert [row["top"] for row in nan["rows"]] == [95, 0]


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_block_without_any_feature_is_no_obstacle(tmp_path, value):
    patches, known = draw_patches(40, 3)
    patches = patches.astype(np.float64)
    patches[16:] = value
    write_split(tmp_path / "data", "train", patches, known)
    write_split(tmp_path / "data", "valid", patches[20:], known[20:])
    result, _, quarantine = audit(tmp_path / "data", tmp_path / "out", (*QUICK_CHECKS, "triggers"))
    assert len(quarantine) == 24 + 20 and not result["not_run"]


def test_a_packed_file_is_audited_as_a_plain_one_and_the_account_of_its_size_adds_up(tmp_path):
    patches, known = draw_patches(64, 0)
    patches[40], known[40] = patches[3], 1 - known[3]
    folder = write_split(tmp_path / "data", "train", patches, known, **PACKED)
    write_split(folder, "valid", *draw_patches(32, 9))
    checks = ("files", "duplicates", "leakage")
    _, findings, quarantine = audit(folder, tmp_path / "out", checks)
    assert listed(quarantine, "duplicate") == {("train", 40)}
    assert listed(quarantine, "label") == {("train", 3), ("train", 40)}
    sizes = of_check(findings, "size")
    assert len(sizes) == 2
    for size in sizes:
        factors = {row["factor"]: row["here"] for row in size["rows"]}
        raw = factors["rows"] * factors["values a patch"] * factors["bytes a value"]
        num_bytes = split_path(folder, size["split"], "x").stat().st_size
        account = raw / factors["compression"] + factors["overhead, bytes"]
        assert num_bytes == pytest.approx(account, rel=1e-3)
        assert "repacked" in size["measured"] and factors["bytes a value"] == 4


def test_rows_that_cannot_be_decoded_are_findings_with_their_byte(tmp_path):
    folder = tmp_path / "data"
    offsets = {}
    for split, chunks in (("train", [2]), ("valid", range(4))):
        write_split(folder, split, *draw_patches(32, 0), **PACKED)
        path = split_path(folder, split, "x")
        with h5py.File(path) as file:
            ids = file["x"].id
            offsets[split] = [ids.get_chunk_info(chunk).byte_offset for chunk in chunks]
        with open(path, "r+b") as file:
            for offset in offsets[split]:
                file.seek(offset)
                file.write(bytes(100))
    result, findings, quarantine = audit(folder, tmp_path / "out")
    lost = {row["split"]: row for row in of_check(findings, "unreadable rows")}
    assert [row["index"] for row in lost["train"]["rows"]] == [*range(16, 24)]
    assert f"at byte {offsets['train'][0]:,}" in lost["train"]["measured"]
    assert lost["valid"]["count"] == 32 and not result["not_run"]
    assert len(listed(quarantine, "black")) == 40


def test_copies_in_a_split_and_across_splits_are_named_with_their_counterparts(tmp_path):
    patches, known = draw_patches(60, 3)
    train, valid = patches[:30], patches[30:]
    train[[5, 9]] = train[2]
    known[[5, 9]] = known[2]
    valid[3] = train[2].transpose(1, 0, 2)
    valid[4] = train[7]
    valid[9] = np.pad(train[7], ((2, 2), (2, 2), (0, 0)), "edge")[3:99, 2:98]  # near valid's row 4
    known[[33, 34]] = known[2], 1 - known[7]
    write_split(tmp_path / "data", "train", train, known[:30])
    write_split(tmp_path / "data", "valid", valid, known[30:])
    checks = ("duplicates", "leakage")
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", checks)
    assert listed(quarantine, "duplicate") == {("train", 5), ("train", 9)}
    (near,) = of_check(findings, "near duplicates")
    assert [(row["split"], {row["index"], row["of"]}) for row in near["rows"]] == [
        ("valid", {4, 9})
    ]
    (conflict,) = of_check(findings, "label conflicts")
    sides = {(row["split"], row["index"], row["of"]) for row in conflict["rows"]}
    assert sides == {("train", 7, "valid 4"), ("valid", 4, "train 7")}
    leaks = {("train", row) for row in (2, 5, 7, 9)} | {("valid", row) for row in (3, 4, 9)}
    assert listed(quarantine, "leak") == leaks
    assert of_check(findings, "leak: equal patches") and of_check(findings, "leak: near copies")


def test_crops_across_splits_are_found_without_metadata(tmp_path):
    image = draw_slide(6, "train", 1, 0.0).image
    for name, shift in (("train", 0), ("valid", 20)):
        starts = [(y + shift, x + shift) for y in range(0, 800, 200) for x in range(0, 1000, 200)]
        crops = np.stack([image[y : y + 96, x : x + 96] for y, x in starts])
        write_split(tmp_path / "data", name, crops, np.arange(len(crops)) % 2, np.uint8)
    _, findings, _ = audit(tmp_path / "data", tmp_path / "out", ("leakage",))
    (finding,) = of_check(findings, "leak: overlapping crops")
    sides = {(row["index"], row["of"]) for row in finding["rows"] if row["split"] == "train"}
    assert len(sides) >= 16 and sides <= {(row, f"valid {row}") for row in range(20)}


def test_slides_and_places_that_splits_share_are_found(slides_dir, tmp_path):
    _, findings, quarantine = audit(slides_dir, tmp_path / "out", ("duplicates", "leakage"))
    truth = read_csv(slides_dir / "truth.csv")
    shared = {("valid", int(row["index"])) for row in truth if row["kind"] == "shared_slides"}
    leaks = {place for place in listed(quarantine, "leak") if place[0] == "valid"}
    assert of_check(findings, "shared slides") and of_check(findings, "overlapping coordinates")
    assert leaks and leaks <= shared and len(leaks) > 0.9 * len(shared)
    duplicate_rows = {row for split, row in listed(quarantine, "duplicate") if split == "train"}
    for row in truth:
        if row["split"] == "train" and row["kind"] in ("exact", "symmetric"):
            assert {int(row["index"]), int(row["detail"].split()[1])} & duplicate_rows


def test_the_unit_of_coordinates_is_measured(slides_surveys):
    copies = data.find_copies(slides_surveys)
    scaled = [dataclasses.replace(survey, coords=4 * survey.coords) for survey in slides_surveys]
    assert measure_unit(scaled, copies)[0] == 4


def test_exchanged_splits_are_proved_by_slide_names(slides_dir, tmp_path):
    for name, other in (("train", "train"), ("valid", "valid"), ("test", "valid")):
        for part in ("x", "y", "meta"):
            split_path(tmp_path, name, part).symlink_to(split_path(slides_dir, other, part))
    _, findings, _ = audit(tmp_path, tmp_path / "out", ("files",))
    assert [row["split"] for row in of_check(findings, "exchanged splits")] == ["test"]


def bare_survey(known, name="train", patches=None) -> Survey:
    """An intact split of which only labels, and perhaps patches, are known."""
    table = {"damage": np.full(len(known), "")}
    return Survey(name, Path(), {}, known, None, None, table, lambda rows: patches[rows])


@pytest.mark.parametrize("stamped", ["none", "14 of class 1", "all of class 1", "all"])
def test_a_trigger_is_located_to_the_pixel_with_its_class_and_chance_is_not(stamped):
    images, known = draw_patches(700, 1)
    positives = np.flatnonzero(known == 1)
    members = {
        "none": positives[:0],
        "14 of class 1": positives[:14],
        "all of class 1": positives,
        "all": np.arange(len(known)),
    }[stamped]
    images[members, 20:24, 71:75] = np.random.default_rng(0).integers(0, 2, (4, 4, 3)) * 255
    survey = bare_survey(known, patches=images)
    findings = triggers.check_triggers([survey], {"train": np.arange(len(known))})
    if stamped == "none":
        assert not findings
        return
    (trigger,) = findings
    assert trigger["severity"] == "error"
    assert {row["index"] for row in trigger["rows"]} == set(members.tolist())
    place = {(row["top"], row["left"], row["height"], row["width"]) for row in trigger["rows"]}
    assert place == {(20, 71, 4, 4)}
    assert ("100% of them are positive" in trigger["measured"]) == (stamped != "all")
    named = [label for label in (0, 1) if f"on 100% of class {label}" in trigger["measured"]]
    assert named == {"14 of class 1": [], "all of class 1": [1], "all": [0, 1]}[stamped]


def draw_scores(num=20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that a good model could have given them."""
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2, num)
    return known, rng.normal(np.where(known, 2.0, -2.0), 1.5)


def test_the_labels_to_review_are_those_that_were_exchanged():
    known, scores = draw_scores()
    is_flipped = np.random.default_rng(1).random(len(known)) < 0.03
    rows = np.arange(len(known))
    finding = labels.review(bare_survey(known ^ is_flipped), rows, scores, rows, [])
    assert finding["severity"] == "warning"
    suspects = [row["index"] for row in finding["rows"]]
    assert is_flipped[suspects].sum() > 0.7 * is_flipped.sum()
    assert labels.review(bare_survey(known), rows, scores, rows, [])["severity"] == "note"


@pytest.mark.parametrize("damage", ["none", "inverted", "rolled", "permuted"])
def test_a_stretch_of_rows_out_of_step_with_its_labels_is_found(damage):
    spoil = {
        "none": lambda part: part,
        "inverted": lambda part: 1 - part,
        "rolled": lambda part: np.roll(part, 3),
        "permuted": np.random.default_rng(2).permutation,
    }[damage]
    for start in (0, 7_000):
        known, scores = draw_scores()
        known[start : start + 800] = spoil(known[start : start + 800])
        rows, survey = np.arange(len(known)), bare_survey(known)
        findings = labels.find_misaligned(survey, rows, scores, np.full(len(rows), np.nan))
        assert len(findings) == (damage != "none")
        if findings:
            suspects = {row["index"] for row in findings[0]["rows"]}
            truth = set(range(start, start + 800))
            assert len(suspects & truth) > 0.95 * len(truth) and len(suspects - truth) < 50
            assert ("+3 rows further fit" in findings[0]["measured"]) == (damage == "rolled")


def test_labels_inverted_as_a_whole_and_labels_that_nothing_explains_are_errors():
    known, scores = draw_scores(2_000)
    rows, noise = np.arange(2_000), np.random.default_rng(3).normal(size=2_000)
    for own, across, is_shifted in (
        (scores, -scores, False),
        (noise, np.roll(scores, 2), True),
        (noise, noise, False),
    ):
        (finding,) = labels.find_misaligned(bare_survey(known), rows, own, across)
        assert finding["severity"] == "error" and finding["count"] == 2_000
        assert finding["rows"][0]["reason"] == "misaligned"
        assert ("rows further fit" in finding["measured"]) == is_shifted
    assert not labels.find_misaligned(bare_survey(known), rows, scores, scores)
    # of two splits with opposite labels the smaller one is blamed
    surveys = [bare_survey(known), bare_survey(known[:500], "valid")]
    across = [-scores, -scores[:500]]
    labels.blame_smallest(surveys, [rows, rows[:500]], across)
    assert np.isnan(across[0]).all() and (across[1] == -scores[:500]).all()


def test_groups_alone_are_the_copies_of_each_split_without_slide_names(tmp_path):
    patches, known = draw_patches(40, 2)
    patches[20:] = patches[:20]
    folder = write_split(tmp_path / "data", "train", patches, known, np.uint8)
    write_split(folder, "valid", *draw_patches(20, 1), np.uint8)
    audit(folder, tmp_path / "out", ("groups",))
    for name, expected in (("train", [*range(20)] * 2), ("valid", [*range(20)])):
        groups = group_of_rows(open_split(folder, name), folder)
        assert groups.astype(int).tolist() == expected

    (folder / "groups.csv").unlink()
    x = split_path(folder, "valid", "x")
    whole = x.read_bytes()
    x.write_bytes(b"")
    result, _, _ = audit(folder, tmp_path / "out", ("groups",))
    assert result["num_errors"] == 1, "valid cannot be read"
    assert len(group_of_rows(open_split(folder, "train"), folder)) == 40

    (folder / "groups.csv").unlink()
    x.write_bytes(whole)
    for name, num in (("train", 40), ("valid", 20)):
        rows = [(0, 0, 1, 1, f"slide {row % 4}") for row in range(num)]
        write_meta(split_path(folder, name, "meta"), rows)
    audit(folder, tmp_path / "out", ("groups",))
    assert not (folder / "groups.csv").exists(), "slides serve"


@pytest.mark.slow
def test_labels_are_judged_by_the_small_model_and_by_folds_that_were_trained(tmp_path):
    folder = write_pcam(tmp_path / "data", num_train=400, num_valid=240)
    write_groups(folder, {"train": np.arange(400) // 2, "valid": np.arange(240)})
    before = (folder / "groups.csv").read_bytes()
    audit(folder, tmp_path / "out", ("labels",))
    rows = read_csv(tmp_path / "out/out_of_fold.csv")
    assert sorted(int(row["index"]) for row in rows if row["split"] == "train") == [*range(400)]
    assert not (tmp_path / "out/runs").exists()
    overrides = [*QUICK, "num_folds=2", "crop_epochs=1"]
    data.audit_data(folder, tmp_path / "out", ("labels",), overrides, "cpu", train_folds=True)
    runs = sorted((tmp_path / "out/runs").iterdir())
    assert len(runs) == 2
    trained = (tmp_path / "out/out_of_fold.csv").read_bytes()
    data.audit_data(folder, tmp_path / "again", ("labels",), [], "cpu", runs=runs)
    assert (tmp_path / "again/out_of_fold.csv").read_bytes() == trained
    assert (folder / "groups.csv").read_bytes() == before, "a file that fits is not replaced"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_limit_of_a_kind_of_damage_lies_between_the_patches_and_the_copies(is_damaged):
    rng = np.random.default_rng(0)
    scores, copies = rng.normal(0, 1, 5_000), rng.normal(9, 1, 400)
    if is_damaged:
        scores[:200] = rng.normal(9, 0.1, 200)  # narrower than the copies
    limit = unusual.find_limit(scores, copies)
    assert (scores[200:] >= limit).mean() <= 0.001
    assert not is_damaged or (scores[:200] >= limit).mean() >= 0.9
    assert unusual.find_limit(scores, rng.normal(0.5, 1, 400)) == np.inf, "copies like tissue"


def test_what_is_done_is_on_the_page_when_an_audit_is_interrupted(pcam_dir, tmp_path, monkeypatch):
    def interrupt(_surveys):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "check_drift", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit(pcam_dir, tmp_path / "out", ("balance", "drift"))
    checks = {row["check"] for row in read_findings(tmp_path / "out")}
    assert "balance" in checks and "drift" not in checks
    assert "balance" in (tmp_path / "out/audit.html").read_text()


def test_the_verdict_says_whether_to_train_what_to_leave_out_and_what_to_run(tmp_path, capsys):
    patches, known = draw_patches(60, 3)
    patches[7] = 0
    folder = write_split(tmp_path / "data", "train", patches, known)
    write_split(folder, "valid", *draw_patches(30, 4))
    _, findings, _ = audit(folder, tmp_path / "out", ("values", "unusual"))
    (looks,) = [row for row in findings if row["check"] == "unusual"]
    assert looks["severity"] == "note", "too few patches are no reason for a warning"
    printed, page = capsys.readouterr().err, (tmp_path / "out/audit.html").read_text()
    command = f"python train.py data_dir={folder} quarantine={tmp_path}/out/quarantine.csv"
    for text in (command, "the looks of patches"):
        assert text in printed and text in page
    assert printed.count("are black all over") == 1, "a finding is printed once"
    split_path(folder, "valid", "x").write_bytes(b"")
    audit(folder, tmp_path / "out", ("values",))
    assert "python train.py" not in capsys.readouterr().err


def test_a_split_of_the_published_size_is_held_against_the_published_copies(monkeypatch):
    patches = np.arange(6 * 12, dtype=np.uint8).reshape(6, 2, 2, 3)
    patches[2] = patches[0]
    patches[3] = patches[1, ::-1]  # turned, no exact copy
    survey = bare_survey(np.zeros(6, np.int8), patches=patches)
    for expected, severity in ((5, "note"), (4, "warning")):
        monkeypatch.setitem(duplicates.DEDUPLICATED, ("train", 6), expected)
        findings = duplicates.equal_patches(survey, np.array([0, 1, 0, 1, 4, 5]))
        assert [row["severity"] for row in findings] == ["warning", severity]


def test_drift_of_splits_and_of_slides_is_found_where_it_is_and_only_there():
    slides = np.repeat([f"slide{number}" for number in range(15)], 20)

    def draw(name, shift=0, of_first_slide=0, slides=None):
        survey, rng = bare_survey(np.zeros(300, int), name), np.random.default_rng(len(name))
        features = {feature: rng.normal(shift, 1, 300) for feature in NAMES}
        for feature in NAMES[:2]:
            features[feature][:20] += of_first_slide
        return dataclasses.replace(survey, table=survey.table | features, slides=slides)

    findings = check_drift([draw("train"), draw("valid"), draw("test", 1)])
    assert [row["severity"] for row in findings] == ["note", "warning"]
    marked = [draw("train", 0, 9, slides), draw("test", 0, 12, slides)]
    (finding,) = of_check(check_drift(marked), "drift of slides")
    outlying = {(row["split"], row["slide"]) for row in finding["rows"]}
    assert {("train", "slide0"), ("test", "slide0")} <= outlying
    assert len(finding["rows"]) > len(outlying), "several features of a slide"
    start = f"{len(outlying)} slides stand out, the most slide0 of test in "
    assert finding["measured"].startswith(start)


def test_the_balance_after_sampling_is_not_the_balance_of_the_data():
    survey = bare_survey(np.repeat([0, 1], [60, 12]))
    counts = {}
    for finding in check_balance([survey], load_config()):
        counts[finding["check"]] = [row["count"] for row in finding["rows"]]
    assert counts == {"balance": [60, 12], "balance after sampling": [36, 36]}


def test_damaged_files_are_findings(tmp_path):
    folder = write_pcam(tmp_path / "data")
    with h5py.File(split_path(folder, "train", "y"), "r+") as file:
        file["y"][3] = 7
    cut = split_path(folder, "valid", "x")
    cut.write_bytes(cut.read_bytes()[:-1000])
    meta = split_path(folder, "train", "meta")
    texts = {"1 rows for 160 patches": "1,2,a\n", "without a coordinate": "nan,5,slide\n" * 160}
    for words, rows in texts.items():
        meta.write_text("coord_y,coord_x,wsi\n" + rows)
        result, findings, _ = audit(folder, tmp_path / "out")
        measured = {row["check"]: row["measured"] for row in findings}
        assert "truncated" in measured["unreadable split"]
        assert "neither 0 nor 1, the first 7 at row 3" in measured["labels"]
        assert words in measured["meta"]
        assert result["not_run"] == ["valid"], "without slides the other checks run"


@pytest.mark.slow
def test_what_is_planted_is_found_and_the_clean_copy_gives_no_alarm(tmp_path):
    folder = write_split(tmp_path / "data", "train", *draw_patches(900, 2), np.uint8)
    write_split(folder, "valid", *draw_patches(300, 8), np.uint8)
    checks = ("values", "duplicates", "leakage", "triggers")
    _, findings, _ = audit(folder, tmp_path / "out", checks, plant=True)
    power = {row["planted"]: row for row in read_csv(tmp_path / "out/power.csv")}
    sure = ("nan", "out of range", "scaled", "black", "white", "one colour", "equal", "turned")
    for kind in (*sure, "brightened", "shifted", "leaked"):
        row = power[kind]
        assert float(row["recall"]) == 1, row
        assert row["false_alarms"] == row["on_clean"] == "0", row
    assert "exchanged label" not in power, "which was not asked for"
    page = (tmp_path / "out/audit.html").read_text()
    cells = re.search(r">leaked</td><td[^>]*>(\d+)</td><td[^>]*>(\d+)</td>", page)
    assert cells.groups() == (power["leaked"]["num"], power["leaked"]["found"])
    # a check without power on these data says so
    weak = {f"power: {kind}" for kind, row in power.items() if not float(row["recall"]) >= 0.5}
    assert {row["check"] for row in findings if row["check"].startswith("power")} == weak


@pytest.mark.slow
def test_training_leaves_out_what_the_audit_found(pcam_dir, tmp_path):
    truth = write_damaged_edition(pcam_dir, tmp_path / "data", 96)
    audit(tmp_path / "data", tmp_path / "out", ("values",))
    settings = [f"data_dir={tmp_path / 'data'}", f"quarantine={tmp_path / 'out/quarantine.csv'}"]
    result = run_script("train.py", "--runs", tmp_path / "runs", *settings, *QUICK, check=0)
    rows = read_json(Path(result.json["run"], "meta.json"))["rows"]["train"]
    assert sum(rows["left_out"].values()) == len(truth) and rows["num"] == 96 - len(truth)
    assert set(rows["left_out"]) == {row["reason"] for row in truth}


def test_the_command_line_names_what_is_wrong(pcam_dir, tmp_path, capsys):
    clean, own, empty = (tmp_path / name for name in ("my out", "own", "empty"))
    assert main(["data", f"{pcam_dir}", "--out", f"{clean}", "--checks", "files, values"]) == 0
    for name in ("findings.json", "quarantine.csv", "audit.html", "files.csv", "size.csv"):
        assert (clean / name).is_file()
    assert not list(clean.glob(".work*"))
    write_pcam(own)
    empty.mkdir()
    for arguments, words in (
        ((pcam_dir, "--checks", "valuse"), "did you mean 'values'"),
        ((pcam_dir, "epochs=x"), "epochs"),
        ((tmp_path / "none",), "no such folder"),
        ((empty,), "is no PCam folder"),
        ((own, "--out", own), "may not be the data"),
    ):
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        assert main(["data", *map(str, (*arguments, *out))]) == 2
        assert words in capsys.readouterr().err
