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

from lib.audit import plant
from lib.audit.data import duplicates, labels, unusual
from lib.audit.data import run as data
from lib.audit.data.balance import check_balance
from lib.audit.data.drift import check_drift
from lib.audit.data.leakage import measure_unit
from lib.audit.data.triggers import check_triggers
from lib.audit.data.values import binomial_chance
from lib.audit.survey import FLAT_STD, Survey, survey_folder
from lib.config import load_config
from lib.files import read_csv
from lib.groups import group_of_rows, write_groups
from lib.pcam import open_split, split_path
from lib.prepare.synthetic import SyntheticPlan, draw_slide, write_synthetic
from lib.splitwriter import SplitWriter, write_meta

QUICK_CHECKS = ("files", "values", "balance", "duplicates", "leakage", "drift")


def audit(folder, out, checks=QUICK_CHECKS, **options) -> tuple[dict, list[dict], list[dict]]:
    """The result, the findings and the quarantine of an audit."""
    result = data.audit_data(folder, out, checks, [], **options)
    return result, json.loads((out / "findings.json").read_text()), read_csv(out / "quarantine.csv")


def write_float(folder, patches, labels, split="train", **storage) -> None:
    folder.mkdir(exist_ok=True)
    with SplitWriter(folder, split, len(patches), np.float32, **storage) as writer:
        writer.add(patches.astype(np.float32), labels)


def of_check(findings, check) -> list[dict]:
    return [found for found in findings if found["check"] == check and found["severity"] != "note"]


@pytest.fixture(scope="module")
def slides_dir(tmp_path_factory):
    """Synthetic slides with everything planted that metadata can tell."""
    plants = {"exact": 0.05, "symmetric": 0.05, "shared_slides": 1.0, "trigger": 0.1}
    folder = tmp_path_factory.mktemp("slides") / "data"
    write_synthetic(SyntheticPlan({"train": 720, "valid": 360}, 2, plants), folder)
    return folder


def test_the_damaged_edition_is_found_exactly(pcam_dir, tmp_path):
    truth = write_damaged_edition(pcam_dir, tmp_path / "data", 80)
    result, findings, quarantine = audit(tmp_path / "data", tmp_path / "out")
    for reason in ("black", "white", "nan", "range"):
        found = score_quarantine(truth, quarantine, reason)
        assert found["planted"] > 0 and found["recall"] == found["precision"] == 1, found
    assert {row["reason"] for row in quarantine} <= {"black", "white", "nan", "range"}
    assert result["num_errors"] and not result["not_run"]
    balance = [found for found in of_check(findings, "balance") if found["split"] == "train"]
    assert balance and "positive (1" in balance[0]["measured"], "five to one is worth a warning"


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
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
    ],
)
def test_each_kind_of_damage_has_its_reason_and_leaves_the_others_alone(tmp_path, reason, spoil):
    patches, known = draw_patches(40, 3)
    patches = patches.astype(np.float64)
    patches[7] = spoil(patches[7])
    write_float(tmp_path / "data", patches, known)
    write_float(tmp_path / "data", *draw_patches(30, 4), split="valid")
    _, _, quarantine = audit(tmp_path / "data", tmp_path / "out", ("values",))
    assert [(row["split"], row["index"], row["reason"]) for row in quarantine] == [
        ("train", "7", reason)
    ]


@pytest.mark.slow
def test_the_account_of_the_size_adds_up(tmp_path):
    patches, known = draw_patches(64, 0)
    write_float(tmp_path / "data", patches, known, chunks=(16, 96, 96, 3), compression="gzip")
    write_float(tmp_path / "data", patches[:32], known[:32], split="valid")
    _, findings, _ = audit(tmp_path / "data", tmp_path / "out", ("files",))
    for found in of_check(findings, "size"):
        factors = {row["factor"]: row["here"] for row in found["rows"]}
        raw = factors["rows"] * factors["values a patch"] * factors["bytes a value"]
        size = split_path(tmp_path / "data", found["split"], "x").stat().st_size
        assert size == pytest.approx(
            raw / factors["compression"] + factors["overhead, bytes"], rel=1e-3
        )
        assert "repacked" in found["measured"] and factors["bytes a value"] == 4
    assert len(of_check(findings, "size")) == 2


def test_a_split_of_which_no_row_can_be_read_is_a_finding(tmp_path):
    patches, known = draw_patches(64, 0)
    packed = {"chunks": (16, 96, 96, 3), "compression": "gzip"}
    write_float(tmp_path / "data", patches[:32], known[:32], **packed)
    write_float(tmp_path / "data", patches[32:], known[32:], split="valid")
    path = split_path(tmp_path / "data", "train", "x")
    with h5py.File(path) as file:
        ids = file["x"].id
        chunks = [ids.get_chunk_info(number) for number in range(ids.get_num_chunks())]
        places = [chunk.byte_offset for chunk in chunks]
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes(100))
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", QUICK_CHECKS)
    assert sum(row["split"] == "train" for row in quarantine) == 32
    (size,) = [row for row in of_check(findings, "size") if row["split"] == "train"]
    assert "repacked" not in size["measured"]


@pytest.mark.slow
def test_copies_in_a_packed_file_are_found_as_in_a_plain_one(tmp_path):
    patches, known = draw_patches(64, 0)
    patches[40], known[40] = patches[3], 1 - known[3]
    write_float(tmp_path / "data", patches, known, chunks=(16, 96, 96, 3), compression="gzip")
    write_float(tmp_path / "data", *draw_patches(32, 9), split="valid")
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", ("duplicates", "leakage"))
    assert {(row["index"], row["reason"]) for row in quarantine} == {
        ("40", "duplicate"),
        ("40", "label"),
        ("3", "label"),
    }
    assert of_check(findings, "label conflicts")


@pytest.mark.slow
def test_a_leak_is_named_on_both_sides(tmp_path):
    patches, known = draw_patches(64, 5)
    folder = write_pcam(tmp_path / "data")
    for path in folder.glob("*valid*"):
        path.unlink()
    with h5py.File(split_path(folder, "train", "x")) as file:
        patches[[1, 2]] = file["x"][[5, 6]]
    known[[1, 2]] = open_split(folder, "train").labels[[5, 6]]
    patches[2] = patches[2].transpose(1, 0, 2)
    with SplitWriter(folder, "valid", 64) as writer:
        writer.add(patches, known)
    _, findings, quarantine = audit(folder, tmp_path / "out", ("leakage",))
    assert {(row["split"], row["index"]) for row in quarantine} == {
        ("train", "5"),
        ("train", "6"),
        ("valid", "1"),
        ("valid", "2"),
    }
    assert {row["reason"] for row in quarantine} == {"leak"} and of_check(
        findings, "leak: equal patches"
    )


def test_crops_and_copies_across_splits_are_found_without_metadata(tmp_path):
    image = draw_slide(6, "train", 1, 0.0).image
    places = [(y, x) for y in range(0, 1000, 110) for x in range(0, 1000, 110)]
    cut = {
        "train": places[:50],
        "valid": [(y + 20, x + 8) for y, x in places[:10]]
        + [(y, x + 2) for y, x in places[10:20]]
        + places[60:80],
    }
    for name, wanted in cut.items():
        with SplitWriter(tmp_path, name, len(wanted)) as writer:
            writer.add(
                np.stack([image[y : y + 96, x : x + 96] for y, x in wanted]),
                np.arange(len(wanted)) % 2,
            )
    _, findings, _ = audit(tmp_path, tmp_path / "out", ("leakage",))
    for check, first in (("leak: overlapping crops", 0), ("leak: near copies", 10)):
        (found,) = of_check(findings, check)
        sides = {(row["index"], row["of"]) for row in found["rows"] if row["split"] == "train"}
        assert len(sides) >= 8 and sides <= {
            (row, f"valid {row}") for row in range(first, first + 10)
        }


def test_copies_inside_a_split_are_found_where_an_equal_one_stands_in_another(tmp_path):
    patches, known = draw_patches(40, 3)
    train, valid = patches[:20], patches[20:].copy()
    valid[4] = train[7]
    shifted = np.pad(train[7], ((2, 2), (2, 2), (0, 0)), "edge")[3:99, 2:98]
    valid[9] = shifted  # a near copy of valid's row 4
    labels = known[20:].copy()
    labels[4] = 1 - known[7]
    write_float(tmp_path / "data", train, known[:20])
    write_float(tmp_path / "data", valid, labels, split="valid")
    checks = ("duplicates", "leakage")
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", checks)
    (near,) = of_check(findings, "near duplicates")
    assert near["split"] == "valid"
    assert {frozenset((row["index"], row["of"])) for row in near["rows"]} == {frozenset((4, 9))}
    (conflict,) = of_check(findings, "label conflicts")
    sides = {(row["split"], row["index"], row["of"]) for row in conflict["rows"]}
    assert sides == {("train", 7, "valid 4"), ("valid", 4, "train 7")}
    listed = {(row["split"], row["index"]) for row in quarantine if row["reason"] == "label"}
    assert listed == {("train", "7"), ("valid", "4")}


def test_a_planted_leak_counts_as_found_by_its_side_in_train():
    truth = [{"split": "valid", "index": 3, "kind": "leaked", "of": 11}]
    listed = [{"split": "train", "index": "11", "reason": "leak"}]
    (power,) = [row for row in plant.measure_power(truth, listed, []) if row["planted"] == "leaked"]
    assert (power["found"], power["false_alarms"]) == (1, 0)
    listed[0]["split"] = "valid"
    (power,) = [row for row in plant.measure_power(truth, listed, []) if row["planted"] == "leaked"]
    assert (power["found"], power["false_alarms"]) == (0, 1)


def test_slides_and_places_that_splits_share_are_found(slides_dir, tmp_path):
    _, findings, quarantine = audit(slides_dir, tmp_path / "out", ("duplicates", "leakage"))
    shared = {
        int(row["index"])
        for row in read_csv(slides_dir / "truth.csv")
        if row["kind"] == "shared_slides"
    }
    listed = {
        int(row["index"])
        for row in quarantine
        if (row["split"], row["reason"]) == ("valid", "leak")
    }
    assert of_check(findings, "shared slides") and of_check(findings, "overlapping coordinates")
    assert listed and listed <= shared and len(listed) > 0.9 * len(shared)
    duplicates = {
        row["index"]
        for row in quarantine
        if (row["split"], row["reason"]) == ("train", "duplicate")
    }
    kinds = {
        row["index"]: row for row in read_csv(slides_dir / "truth.csv") if row["split"] == "train"
    }
    planted = [row for row in kinds.values() if row["kind"] in ("exact", "symmetric")]
    assert all({row["index"], row["detail"].split()[1]} & duplicates for row in planted)


def test_the_unit_of_coordinates_is_measured(slides_dir, tmp_path):
    surveys, _ = survey_folder(slides_dir, tmp_path)
    found = data.find_copies(surveys)
    surveys = [type(survey)(**(vars(survey) | {"coords": survey.coords * 4})) for survey in surveys]
    assert measure_unit(surveys, found)[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("stamped", ["none", "14 of class 1", "all of class 1", "all"])
def test_a_trigger_is_located_to_the_pixel_with_its_class_and_chance_is_not(stamped, tmp_path):
    images, known = draw_patches(1400, 1)
    positives = np.flatnonzero(known == 1)
    members = {
        "none": positives[:0],
        "14 of class 1": positives[:14],
        "all of class 1": positives,
        "all": np.arange(1400),
    }[stamped]
    images[members, 20:24, 71:75] = np.random.default_rng(0).integers(0, 2, (4, 4, 3)) * 255
    with SplitWriter(tmp_path, "train", len(images)) as writer:
        writer.add(images, known)
    surveys, _ = survey_folder(tmp_path, tmp_path)
    findings = check_triggers(surveys[0], np.arange(1400))
    errors = [row for row in findings if row["severity"] == "error"]
    if stamped == "none":
        assert not errors
        return
    (trigger,) = errors
    assert {row["index"] for row in trigger["rows"]} == set(members.tolist())
    place = {(row["top"], row["left"], row["height"], row["width"]) for row in trigger["rows"]}
    assert place == {(20, 71, 4, 4)}
    assert ("100% of them are positive" in trigger["measured"]) == (stamped != "all")
    named = [label for label in (0, 1) if f"on 100% of class {label}" in trigger["measured"]]
    assert named == {"14 of class 1": [], "all of class 1": [1], "all": [0, 1]}[stamped]


def bare_survey(known, name="train") -> Survey:
    """A split of which only the labels are known."""
    table = {"damage": np.full(len(known), -1, np.int8)}
    nothing = np.empty(0)
    return Survey(name, Path(), {}, known, None, None, table, nothing, {}, nothing, None)


def draw_scores(num=20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that a good model could have given them."""
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2, num)
    return known, rng.normal(np.where(known, 2.0, -2.0), 1.5)


def test_the_labels_to_review_are_those_that_were_exchanged():
    known, scores = draw_scores()
    is_flipped = np.random.default_rng(1).random(len(known)) < 0.03
    groups = np.arange(len(known))
    found = labels.review(bare_survey(known ^ is_flipped), groups, scores, groups, [])
    assert found["severity"] == "warning"
    listed = [row["index"] for row in found["rows"]]
    assert is_flipped[listed].sum() > 0.7 * is_flipped.sum()
    assert labels.review(bare_survey(known), groups, scores, groups, [])["severity"] == "note"


@pytest.mark.parametrize("start", [0, 7_000])
@pytest.mark.parametrize("damage", ["none", "inverted", "rolled", "permuted"])
def test_a_stretch_of_rows_out_of_step_with_its_labels_is_found(start, damage):
    known, scores = draw_scores()
    part = slice(start, start + 800)
    spoil = {
        "none": lambda part: part,
        "inverted": lambda part: 1 - part,
        "rolled": lambda part: np.roll(part, 3),
        "permuted": np.random.default_rng(2).permutation,
    }[damage]
    known[part] = spoil(known[part])
    rows = np.arange(len(known))
    findings = labels.find_misaligned(bare_survey(known), rows, scores, np.full(len(rows), np.nan))
    assert len(findings) == (damage != "none")
    if findings:
        listed = {row["index"] for row in findings[0]["rows"]}
        truth = set(range(part.start, part.stop))
        assert len(listed & truth) > 0.95 * len(truth) and len(listed - truth) < 50
        assert ("+3 rows further fit" in findings[0]["measured"]) == (damage == "rolled")


def test_of_two_splits_with_opposite_labels_the_smaller_one_is_blamed():
    known, scores = draw_scores(2_000)
    surveys = [bare_survey(known), bare_survey(known[:500], "valid")]
    rows_of = [np.arange(2_000), np.arange(500)]
    across = [-scores, -scores[:500]]
    labels.blame_smallest(surveys, rows_of, across)
    assert np.isnan(across[0]).all() and (across[1] == -scores[:500]).all()


def test_labels_inverted_as_a_whole_and_labels_that_nothing_explains_are_errors():
    known, scores = draw_scores(2_000)
    rows, noise = np.arange(2_000), np.random.default_rng(3).normal(size=2_000)
    for own, across in ((scores, -scores), (noise, np.roll(scores, 2)), (noise, noise)):
        (found,) = labels.find_misaligned(bare_survey(known), rows, own, across)
        assert found["severity"] == "error" and found["count"] == 2_000
        assert found["rows"][0]["reason"] == "misaligned"
        is_shifted = across is not noise and own is noise
        assert ("rows further fit" in found["measured"]) == is_shifted
    assert not labels.find_misaligned(bare_survey(known), rows, scores, scores)


def test_groups_alone_are_the_copies_of_each_split_without_slide_names(tmp_path):
    folder = write_pcam(tmp_path / "data", num_train=30, num_valid=20)
    patches, known = draw_patches(40, 2)
    patches[20:] = patches[:20]
    with SplitWriter(folder, "train", 40) as writer:
        writer.add(patches, known)
    _, findings, _ = audit(folder, tmp_path / "out", ("groups",))
    assert [(found["check"], found["split"]) for found in findings] == [
        ("groups", "train"),
        ("groups", "valid"),
    ]
    for name, expected in (("train", [*range(20)] * 2), ("valid", [*range(20)])):
        groups = group_of_rows(open_split(folder, name), folder)
        assert groups.astype(int).tolist() == expected

    (folder / "groups.csv").unlink()
    for name, num in (("train", 40), ("valid", 20)):
        rows = [(0, 0, 1, 1, f"slide {row % 4}") for row in range(num)]
        write_meta(split_path(folder, name, "meta"), rows)
    audit(folder, tmp_path / "out", ("groups",))
    assert not (folder / "groups.csv").exists(), "slides serve"


def test_groups_of_a_split_are_written_though_another_cannot_be_read(tmp_path):
    folder = write_pcam(tmp_path / "data", num_train=30, num_valid=20)
    split_path(folder, "valid", "x").write_bytes(b"")
    result, _, _ = audit(folder, tmp_path / "out", ("groups",))
    assert result["num_errors"] == 1
    assert len(group_of_rows(open_split(folder, "train"), folder)) == 30


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


def test_few_patches_are_not_judged_by_their_looks(pcam_dir, tmp_path):
    result, findings, quarantine = audit(pcam_dir, tmp_path / "out", ("unusual",))
    assert not quarantine and result["num_warnings"] == 0
    assert [(row["check"], row["severity"]) for row in findings] == [("unusual", "note")]


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
        audit(pcam_dir, tmp_path / "out", ("values", "balance", "drift"))
    checks = {row["check"] for row in json.loads((tmp_path / "out/findings.json").read_text())}
    assert "balance" in checks and "drift" not in checks
    assert "balance" in (tmp_path / "out/audit.html").read_text()


def test_the_verdict_says_whether_to_train_what_to_leave_out_and_what_to_run(tmp_path, capsys):
    patches, known = draw_patches(60, 3)
    patches[7] = 0
    write_float(tmp_path / "data", patches, known)
    write_float(tmp_path / "data", *draw_patches(30, 4), split="valid")
    audit(tmp_path / "data", tmp_path / "out", ("values",))
    printed = capsys.readouterr().err
    command = f"python train.py data_dir={tmp_path}/data quarantine={tmp_path}/out/quarantine.csv"
    assert command in printed and command in (tmp_path / "out/audit.html").read_text()
    assert printed.count("are black all over") == 1, "a finding is printed once"
    split_path(tmp_path / "data", "valid", "x").write_bytes(b"")
    audit(tmp_path / "data", tmp_path / "out", ("values",))
    assert "python train.py" not in capsys.readouterr().err


def test_a_split_of_the_published_size_is_held_against_the_published_copies(monkeypatch):
    survey = bare_survey(np.zeros(6, np.int8))
    stays = np.array([0, 1, 0, 1, 4, 5])
    patches = np.arange(6, dtype=np.uint8)
    patches[2] = patches[0]  # row 3 is row 1 turned, no exact copy
    survey = dataclasses.replace(survey, read=lambda rows: patches[rows])
    for expected, severity in ((5, "note"), (4, "warning")):
        monkeypatch.setitem(duplicates.DEDUPLICATED, ("train", 6), expected)
        (found,) = duplicates.compare_published(survey, stays)
        assert found["severity"] == severity


def test_drift_is_found_where_it_is_and_only_there(tmp_path):
    patches, known = draw_patches(800, 1)
    write_float(tmp_path / "data", patches[:500], known[:500])
    for name, change, severity in (("same", 0, "note"), ("darker", 12, "warning")):
        darker = np.clip(patches[500:].astype(np.int64) - change, 0, 255)
        write_float(tmp_path / "data", darker, known[500:], split="valid")
        surveys, _ = survey_folder(tmp_path / "data", tmp_path)
        (found,) = check_drift(surveys)
        assert found["severity"] == severity, (name, found["measured"])


def test_slides_that_stand_out_are_counted_once_and_the_farthest_of_all_splits_is_named(tmp_path):
    patches, known = draw_patches(600, 1)
    slides = np.repeat([f"slide{number}" for number in range(15)], 20)
    patches[:20] = np.clip(patches[:20].astype(np.int64) - 25, 0, 255)  # darker, train's slide0
    patches[300:320] //= 3  # darker still: valid's slide0
    write_float(tmp_path / "data", patches[:300], known[:300])
    write_float(tmp_path / "data", patches[300:], known[300:], split="valid")
    surveys, _ = survey_folder(tmp_path / "data", tmp_path)
    surveys = [type(survey)(**(vars(survey) | {"slides": slides})) for survey in surveys]
    found = next(row for row in check_drift(surveys) if row["check"] == "drift of slides")
    outlying = {(row["split"], row["slide"]) for row in found["rows"]}
    assert outlying >= {("train", "slide0"), ("valid", "slide0")}
    assert len(found["rows"]) > len(outlying), "several features of a slide"
    start = f"{len(outlying)} slides stand out, the most slide0 of valid in "
    assert found["measured"].startswith(start)
    assert not any("nan" in row["measured"] for row in check_drift(surveys)), "splits share names"


def test_the_balance_after_sampling_is_not_the_balance_of_the_data(tmp_path):
    patches, known = draw_patches(120, 1)
    keep = np.concatenate([np.flatnonzero(known == 0), np.flatnonzero(known == 1)[:12]])
    with SplitWriter(tmp_path, "train", len(keep)) as writer:
        writer.add(patches[keep], known[keep])
    surveys, _ = survey_folder(tmp_path, tmp_path)
    counts = {
        found["check"]: [row["count"] for row in found["rows"]]
        for found in check_balance(surveys, load_config())
    }
    assert counts["balance"] == [60, 12] and counts["balance after sampling"] == [36, 36]


def test_damaged_files_are_findings(tmp_path):
    folder = write_pcam(tmp_path / "data")
    with h5py.File(split_path(folder, "train", "y"), "r+") as file:
        file["y"][3] = 7
    cut = split_path(folder, "valid", "x")
    cut.write_bytes(cut.read_bytes()[:-1000])
    split_path(folder, "train", "meta").write_text("coord_y,coord_x,wsi\n1,2,a\n")
    result = run_script(
        "audit.py",
        "data",
        folder,
        "--out",
        tmp_path / "out",
        "--checks",
        ",".join(QUICK_CHECKS),
        check=1,
    )
    findings = {
        found["check"]: found["measured"]
        for found in json.loads((tmp_path / "out/findings.json").read_text())
    }
    assert "truncated" in findings["unreadable split"]
    assert "neither 0 nor 1, the first 7 at row 3" in findings["labels"]
    assert "1 rows for 160 patches" in findings["meta"]
    assert result.json["not_run"] == ["valid"]


def test_a_row_that_cannot_be_decoded_is_named_with_its_byte(tmp_path):
    patches, known = draw_patches(64, 0)
    write_float(tmp_path / "data", patches, known, chunks=(8, 96, 96, 3), compression="gzip")
    path = split_path(tmp_path / "data", "train", "x")
    with h5py.File(path) as file:
        offset = file["x"].id.get_chunk_info(2).byte_offset
    with open(path, "r+b") as file:
        file.seek(offset + 200)
        file.write(b"\xff" * 400)
    surveys, findings = survey_folder(tmp_path / "data", tmp_path)
    lost = next(found for found in findings if found["check"] == "unreadable rows")
    assert [row["index"] for row in lost["rows"]] == list(
        range(16, 24)
    ) and f"at byte {offset:,}" in lost["measured"]
    assert len(surveys[0]) == 64 and len(surveys[0].intact) == 56


def test_exchanged_splits_are_proved_by_slide_names(slides_dir, tmp_path):
    for name, other in (("train", "train"), ("valid", "valid"), ("test", "valid")):
        for part in ("x", "y", "meta"):
            split_path(tmp_path, name, part).symlink_to(split_path(slides_dir, other, part))
    _, findings, _ = audit(tmp_path, tmp_path / "out", ("files",))
    assert [found["split"] for found in of_check(findings, "exchanged splits")] == ["test"]


def test_what_is_planted_is_found_and_the_clean_copy_gives_no_alarm(tmp_path):
    patches, known = draw_patches(900, 2)
    with SplitWriter(tmp_path, "train", 900) as writer:
        writer.add(patches, known)
    with SplitWriter(tmp_path, "valid", 300) as writer:
        writer.add(*draw_patches(300, 8))
    audit(tmp_path, tmp_path / "out", ("values", "duplicates", "leakage"), plant=True)
    power = {row["planted"]: row for row in read_csv(tmp_path / "out/power.csv")}
    sure = ("nan", "out of range", "scaled", "black", "white", "one colour", "equal", "turned")
    for kind in (*sure, "brightened", "shifted", "leaked"):
        found = power[kind]
        assert float(found["recall"]) == 1, found
        assert found["false_alarms"] == found["on_clean"] == "0", found
    assert "exchanged label" not in power, "which was not asked for"
    page = (tmp_path / "out/audit.html").read_text()
    cells = re.search(r">leaked</td><td[^>]*>(\d+)</td><td[^>]*>(\d+)</td>", page)
    assert cells.groups() == (power["leaked"]["num"], power["leaked"]["found"])


def test_a_check_without_power_on_these_data_says_so(tmp_path):
    for split, num in (("train", 300), ("valid", 100)):
        with SplitWriter(tmp_path, split, num) as writer:
            writer.add(*draw_patches(num, num))
    _, findings, _ = audit(tmp_path, tmp_path / "out", ("triggers",), plant=True)
    assert [found["check"] for found in findings if found["check"].startswith("power")] == [
        "power: trigger"
    ]


@pytest.mark.slow
def test_training_leaves_out_what_the_audit_found(pcam_dir, tmp_path):
    truth = write_damaged_edition(pcam_dir, tmp_path / "data", 96)
    run_script(
        "audit.py",
        "data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--checks",
        "values",
        check=1,
    )
    settings = (
        f"data_dir={tmp_path / 'data'}",
        f"quarantine={tmp_path / 'out/quarantine.csv'}",
        *QUICK,
    )
    result = run_script("train.py", "--runs", tmp_path / "runs", *settings, check=0)
    with open(f"{result.json['run']}/meta.json") as file:
        rows = json.load(file)["rows"]["train"]
    assert sum(rows["left_out"].values()) == len(truth) and rows["num"] == 96 - len(truth)
    assert set(rows["left_out"]) == {row["reason"] for row in truth}


@pytest.mark.slow
def test_the_command_line_names_what_is_wrong(pcam_dir, tmp_path):
    result = run_script("audit.py", "data", pcam_dir, "--checks", "valuse", check=2)
    assert "did you mean 'values'" in result.stderr
    assert (
        "is no PCam folder"
        in run_script("audit.py", "data", tmp_path, "--out", tmp_path / "out", check=2).stderr
    )
    clean = run_script(
        "audit.py",
        "data",
        pcam_dir,
        "--out",
        tmp_path / "my out",
        "--checks",
        "files, values,balance",
        check=0,
    )
    assert clean.json["num_suspects"] == 0 and FLAT_STD
    for name in (
        "findings.json",
        "quarantine.csv",
        "audit.html",
        "balance.csv",
        "files.csv",
        "size.csv",
    ):
        assert (tmp_path / "my out" / name).is_file()
    assert not list((tmp_path / "my out").glob(".work*"))


@pytest.mark.parametrize("scale", [lambda patch: patch / 255, lambda patch: patch / 127.5 - 1])
def test_a_scaled_copy_is_still_a_copy(tmp_path, scale):
    patches, known = draw_patches(40, 3)
    patches = patches.astype(np.float64)
    patches[30] = scale(patches[4])
    known[30] = known[4]
    write_float(tmp_path / "data", patches, known)
    write_float(tmp_path / "data", *draw_patches(30, 4), split="valid")
    _, _, quarantine = audit(tmp_path / "data", tmp_path / "out", ("duplicates",))
    assert [(row["index"], row["reason"]) for row in quarantine] == [("30", "duplicate")]


@pytest.mark.parametrize("value", [0, 255, np.nan])
def test_a_block_without_any_feature_is_no_obstacle(tmp_path, value):
    patches, known = draw_patches(40, 3)
    patches = patches.astype(np.float64)
    patches[16:] = value
    write_float(tmp_path / "data", patches, known)
    write_float(tmp_path / "data", patches[20:], known[20:], split="valid")
    result, _, quarantine = audit(tmp_path / "data", tmp_path / "out", (*QUICK_CHECKS, "triggers"))
    assert len(quarantine) == 24 + 20 and not result["not_run"]


def test_every_copy_across_splits_is_named_not_the_first_alone(tmp_path):
    patches, known = draw_patches(40, 3)
    patches[[5, 9]] = patches[2]
    with SplitWriter(tmp_path, "train", 40) as writer:
        writer.add(patches, known)
    others, labels_of = draw_patches(30, 4)
    others[7] = patches[2]
    with SplitWriter(tmp_path, "valid", 30) as writer:
        writer.add(others, labels_of)
    _, _, quarantine = audit(tmp_path, tmp_path / "out", ("leakage",))
    leaked = {(row["split"], int(row["index"])) for row in quarantine}
    assert leaked == {("train", 2), ("train", 5), ("train", 9), ("valid", 7)}


def test_the_chance_of_a_share_is_the_binomial_one():
    assert binomial_chance(13, 13, 0.5) == binomial_chance(0, 13, 0.5) == pytest.approx(2 / 2**13)
    assert binomial_chance(3, 4, 0.5) == pytest.approx(10 / 16) and binomial_chance(
        2, 4, 0.5
    ) == pytest.approx(1)
    assert binomial_chance(0, 3, 0.1) == pytest.approx(1.0) and binomial_chance(
        3, 3, 0.1
    ) == pytest.approx(1e-3)
    assert binomial_chance(0, 5, 0.0) == 1 and binomial_chance(1, 5, 0.0) == 0


def test_an_earlier_audit_and_what_a_killed_one_left_are_cleared_away(pcam_dir, tmp_path):
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    write_damaged_edition(pcam_dir, damaged, 80)
    audit(damaged, out, ("values",))
    (out / ".work.killed").mkdir()
    assert (out / "values_nan.csv").exists()
    audit(pcam_dir, out, ("values",))
    pictures = {"counts.png", "histograms.png"}
    texts = {"audit.html", "findings.json", "histograms.csv", "quarantine.csv"}
    assert {path.name for path in out.iterdir()} == pictures | texts


@pytest.mark.slow
def test_wrong_use_is_refused_before_the_work_begins(pcam_dir, tmp_path):
    assert (
        "epochs"
        in run_script(
            "audit.py", "data", pcam_dir, "--out", tmp_path / "a", "epochs=x", check=2
        ).stderr
    )
    assert (
        "no such folder"
        in run_script(
            "audit.py", "data", tmp_path / "none", "--out", tmp_path / "a", check=2
        ).stderr
    )
    own = write_pcam(tmp_path / "own")
    assert (
        "may not be the data" in run_script("audit.py", "data", own, "--out", own, check=2).stderr
    )


def test_coordinates_that_are_none_cost_the_checks_by_slide_and_no_more(tmp_path):
    folder = write_pcam(tmp_path / "data")
    for split, num in (("train", 160), ("valid", 64)):
        rows = "".join(f"{row},nan,5,0,0,slide\n" for row in range(num))
        split_path(folder, split, "meta").write_text(
            ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n" + rows
        )
    result, findings, _ = audit(folder, tmp_path / "out", ("leakage", "drift", "files"))
    assert len(of_check(findings, "meta")) == 2 and not result["not_run"]
