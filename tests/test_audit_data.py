"""The audit of data: each kind of damage is found, nothing else is, and damaged files become
findings, not crashes.
"""

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import QUICK, draw_patches, write_pcam
from damaged import KINDS

from audit import main
from lib.audit.data import duplicates, labels, triggers, unusual
from lib.audit.data import run as data
from lib.audit.data.drift import check_drift
from lib.audit.survey import Survey
from lib.batches import read_quarantine
from lib.config import load_config
from lib.features import NAMES
from lib.files import read_csv
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


def bare_survey(known, name="train", patches=None) -> Survey:
    """An intact split of which only labels, and perhaps patches, are known."""
    table = {"damage": np.full(len(known), "")}
    return Survey(name, {}, known, None, table, lambda rows: patches[rows])


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
    known = (np.arange(40) % 7 == 0).astype(np.uint8)
    write_split(tmp_path / "data", "train", patches, known)
    write_split(tmp_path / "data", "valid", *draw_patches(30, 4))
    checks = ("files", "values", "balance", "duplicates")
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", checks)
    reasons = {
        int(row["index"]): row["reason"] for row in quarantine if row["reason"] != "duplicate"
    }
    assert reasons == dict(enumerate(reason for reason, _ in SPOILED)) | {33: "scaled"}
    assert listed(quarantine, "duplicate") == {("train", 33)}
    (nan,) = of_check(findings, "values: nan")
    assert [(row["top"], row["height"]) for row in nan["rows"]] == [(95, 1), (0, 96)]
    (balance,) = of_check(findings, "balance")
    assert "34 negative, 6 positive" in balance["measured"], "five to one is worth a warning"
    # training reads what the audit has written
    certain = load_config().quarantine_reasons
    split = open_split(tmp_path / "data", "train")
    left_out = read_quarantine(tmp_path / "out/quarantine.csv", split, certain)
    assert left_out.keys() == {*range(9), 33}, "but what is merely flat or partly black"


def test_rows_of_a_packed_file_that_cannot_be_decoded_are_findings(tmp_path):
    folder = tmp_path / "data"
    for split, chunks in (("train", [2]), ("valid", range(4))):
        write_split(folder, split, *draw_patches(32, 0), **PACKED)
        path = split_path(folder, split, "x")
        with h5py.File(path) as file:
            offsets = [file["x"].id.get_chunk_info(chunk).byte_offset for chunk in chunks]
        with open(path, "r+b") as file:
            for offset in offsets:
                file.seek(offset)
                file.write(bytes(100))
    result, findings, quarantine = audit(folder, tmp_path / "out")
    lost = {row["split"]: row for row in of_check(findings, "unreadable rows")}
    assert [row["index"] for row in lost["train"]["rows"]] == [*range(16, 24)]
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
    image = draw_slide(6, "train", 1, 0.0).image
    train[20], valid[20] = image[:96, :96], image[20:116, 20:116]
    write_split(tmp_path / "data", "train", train, known[:30])
    write_split(tmp_path / "data", "valid", valid, known[30:])
    checks = ("duplicates", "leakage")
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", checks)
    assert listed(quarantine, "duplicate") == {("train", 5), ("train", 9)}
    (near,) = of_check(findings, "near duplicates")
    pairs = [(row["split"], {row["index"], row["of"]}) for row in near["rows"]]
    assert pairs == [("valid", {4, 9})]
    (conflict,) = of_check(findings, "label conflicts")
    sides = {(row["split"], row["index"], row["of"]) for row in conflict["rows"]}
    assert sides == {("train", 7, "valid 4"), ("valid", 4, "train 7")}
    leaks = {("train", row) for row in (2, 5, 7, 9, 20)}
    leaks |= {("valid", row) for row in (3, 4, 9, 20)}
    assert listed(quarantine, "leak") == leaks
    (crops,) = of_check(findings, "leak: overlapping crops")
    assert {row["of"] for row in crops["rows"]} == {"train 20", "valid 20"}
    assert of_check(findings, "leak: equal patches") and of_check(findings, "leak: near copies")


def test_slides_that_splits_share_are_found(tmp_path):
    folder = tmp_path / "data"
    plan = SyntheticPlan({"train": 120, "valid": 60}, 2, {"shared_slides": 1.0})
    write_synthetic(plan, folder)
    _, findings, _ = audit(folder, tmp_path / "out", ("leakage",))
    (shared,) = of_check(findings, "shared slides")
    assert shared["split"] == "train and valid"


def test_a_split_of_the_published_size_is_held_against_the_published_copies(monkeypatch):
    patches = np.arange(6 * 12, dtype=np.uint8).reshape(6, 2, 2, 3)
    patches[2] = patches[0]
    patches[3] = patches[1, ::-1]  # turned, no exact copy
    survey = bare_survey(np.zeros(6, np.int8), patches=patches)
    for expected, severity in ((5, "note"), (4, "warning")):
        monkeypatch.setitem(duplicates.DEDUPLICATED, ("train", 6), expected)
        findings = duplicates.find_equal(survey, [[0, 2], [1, 3]])
        assert [row["severity"] for row in findings] == ["warning", severity]


@pytest.mark.parametrize("num, num_of_class_0", [(0, 0), (14, 0), (310, 0), (310, 310)])
def test_a_trigger_is_located_to_the_pixel_with_its_class_and_chance_is_not(num, num_of_class_0):
    images, known = draw_patches(620, 1)
    members = np.flatnonzero(known == 1)[:num]
    members = np.append(members, np.flatnonzero(known == 0)[:num_of_class_0])
    images[members, 20:24, 71:75] = np.random.default_rng(0).integers(0, 2, (4, 4, 3)) * 255
    survey = bare_survey(known, patches=images)
    findings = triggers.check_triggers([survey], {"train": np.arange(len(known))})
    assert len(findings) == (num > 0)
    for trigger in findings:
        assert trigger["severity"] == "error"
        assert {row["index"] for row in trigger["rows"]} == set(members.tolist())
        place = {(row["top"], row["left"], row["height"], row["width"]) for row in trigger["rows"]}
        assert place == {(20, 71, 4, 4)}
        assert f"{num / 310:.0%} of class 1" in trigger["measured"]
        assert f"{num_of_class_0 / 310:.0%} of class 0" in trigger["measured"]


@pytest.mark.parametrize("damage", ["none", "inverted", "rolled", "permuted"])
def test_a_stretch_of_rows_out_of_step_with_its_labels_is_found(damage):
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2, 20_000)
    scores = rng.normal(np.where(known, 2.0, -2.0), 1.5)  # of a good model
    spoil = {
        "none": lambda part: part,
        "inverted": lambda part: 1 - part,
        "rolled": lambda part: np.roll(part, 3),
        "permuted": rng.permutation,
    }[damage]
    known[7_000:7_800] = spoil(known[7_000:7_800])
    rows = np.arange(len(known))
    findings = labels.find_misaligned(bare_survey(known), rows, scores, None, rows)
    assert len(findings) == (damage != "none")
    for finding in findings:
        suspects = {row["index"] for row in finding["rows"]}
        assert len(suspects & {*range(7_000, 7_800)}) > 760 and len(suspects) < 850
    noise = rng.normal(size=20_000)
    (finding,) = labels.find_misaligned(bare_survey(known), rows, noise, None, rows)
    assert finding["count"] == 20_000, "no model learns these labels"


@pytest.mark.slow
def test_the_small_model_learns_labels_and_blames_the_smaller_of_two_contradictory_splits(tmp_path):
    for name, num in (("train", 440), ("valid", 420)):
        patches, known = draw_patches(num, len(name))
        write_split(tmp_path / "data", name, patches, known ^ (name == "valid"), np.uint8)
    _, findings, quarantine = audit(tmp_path / "data", tmp_path / "out", ("labels",))
    assert listed(quarantine, "misaligned") == {("valid", row) for row in range(420)}
    rows = read_csv(tmp_path / "out/out_of_fold.csv")
    assert sorted(int(row["index"]) for row in rows) == [*range(440)]


def test_groups_alone_are_the_copies_of_each_split_without_slide_names(tmp_path):
    patches, known = draw_patches(40, 2)
    patches[20:] = patches[:20]
    folder = write_split(tmp_path / "data", "train", patches, known, np.uint8)
    write_split(folder, "valid", *draw_patches(20, 1), np.uint8)
    x = split_path(folder, "valid", "x")
    whole = x.read_bytes()
    x.write_bytes(b"")
    result, _, _ = audit(folder, tmp_path / "out", ("groups",))
    assert result["num_errors"] == 1, "valid cannot be read"
    x.write_bytes(whole)
    groups = group_of_rows(open_split(folder, "train"), folder)
    assert groups.astype(int).tolist() == [*range(20)] * 2

    (folder / "groups.csv").unlink()
    for name, num in (("train", 40), ("valid", 20)):
        rows = [(0, 0, 1, 1, f"slide {row % 4}") for row in range(num)]
        write_meta(split_path(folder, name, "meta"), rows)
    audit(folder, tmp_path / "out", ("groups",))
    assert not (folder / "groups.csv").exists(), "slides serve"


@pytest.mark.slow
def test_labels_are_judged_by_folds_that_are_trained_here_and_by_those_of_a_team(tmp_path):
    folder = write_pcam(tmp_path / "data", num_train=420, num_valid=16)
    write_groups(folder, {"train": np.arange(420) // 2, "valid": np.arange(16)})
    overrides = [*QUICK[1:], "epochs=1", "crop_epochs=1", "num_folds=2"]
    data.audit_data(folder, tmp_path / "out", ("labels",), overrides, "cpu", train_folds=True)
    runs = sorted((tmp_path / "out/runs").iterdir())
    assert len(runs) == 2
    trained = (tmp_path / "out/out_of_fold.csv").read_bytes()
    assert trained.count(b"train") == 420
    audit(folder, tmp_path / "again", ("labels",), device="cpu", runs=runs)
    assert (tmp_path / "again/out_of_fold.csv").read_bytes() == trained


@pytest.mark.slow
def test_unusual_patches_are_found_in_a_small_set(monkeypatch, tmp_path):
    monkeypatch.setattr(unusual, "LEAST_ROWS", 300)
    monkeypatch.setattr(unusual, "COPIES", 100)
    image = draw_slide(5, "train", 2, 0.5).image
    starts = range(0, 1100, 48)
    patches = np.stack([image[y : y + 96, x : x + 96] for y in starts for x in starts])
    rng = np.random.default_rng(0)
    patches = patches[rng.permutation(len(patches))[:400]]
    kinds = {"inverted": "colour", "black half": "partial", "noise, deviation 15": "detail"}
    for number, kind in enumerate(kinds):
        for row in range(8 * number, 8 * number + 8):
            damaged = KINDS[kind][1](patches[row], patches[50], rng)
            patches[row] = np.clip(damaged, 0, 255)
    write_split(tmp_path / "data", "train", patches, np.arange(400) % 2, np.uint8)
    write_split(tmp_path / "data", "valid", *draw_patches(20, 1), np.uint8)
    _, _, quarantine = audit(tmp_path / "data", tmp_path / "out", ("unusual",))
    for number, reason in enumerate(kinds.values()):
        truth = {("train", row) for row in range(8 * number, 8 * number + 8)}
        assert len(listed(quarantine, reason) & truth) >= 4, reason
    suspects = {row for split, row in listed(quarantine, *unusual.ADVICE) if split == "train"}
    assert len(suspects - set(range(24))) <= 4


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
    audit(folder, tmp_path / "out", ("values", "unusual"))
    printed, page = capsys.readouterr().err, (tmp_path / "out/audit.html").read_text()
    command = f"python train.py data_dir={folder} quarantine={tmp_path}/out/quarantine.csv"
    for text in (command, "not checked: files"):
        assert text in printed and text in page
    assert printed.count("are black all over") == 1, "a finding is printed once"
    split_path(folder, "valid", "x").write_bytes(b"")
    (tmp_path / "out/.work.killed").mkdir()
    audit(folder, tmp_path / "out", ("values",))
    assert "python train.py" not in capsys.readouterr().err
    assert not (tmp_path / "out/.work.killed").exists()


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


def test_damaged_files_are_findings(tmp_path):
    folder = write_pcam(tmp_path / "data", 40, 20)
    with h5py.File(split_path(folder, "train", "y"), "r+") as file:
        file["y"][3] = 7
    cut = split_path(folder, "valid", "x")
    cut.write_bytes(cut.read_bytes()[:-1000])
    meta = split_path(folder, "train", "meta")
    meta.write_text("coord_y,coord_x,wsi\n1,2,a\n")
    result, findings, _ = audit(folder, tmp_path / "out")
    measured = {row["check"]: row["measured"] for row in findings}
    assert "truncated" in measured["unreadable split"]
    assert "neither 0 nor 1, the first 7 at row 3" in measured["labels"]
    assert "1 rows for 40 patches" in measured["meta"]
    assert result["not_run"] == ["valid"], "without slides the other checks run"


@pytest.mark.slow
def test_what_is_planted_is_found_and_nothing_else(tmp_path):
    folder = write_split(tmp_path / "data", "train", *draw_patches(900, 2), np.uint8)
    write_split(folder, "valid", *draw_patches(300, 8), np.uint8)
    checks = ("values", "duplicates", "leakage", "triggers")
    _, findings, _ = audit(folder, tmp_path / "out", checks, plant=True)
    power = {row["planted"]: row for row in read_csv(tmp_path / "out/power.csv")}
    sure = ("nan", "out_of_range", "scaled", "black", "white", "constant", "equal", "symmetric")
    for kind in (*sure, "brightened", "shifted", "leaked"):
        row = power[kind]
        assert float(row["recall"]) == 1, row
        assert row["false_alarms"] == "0", row
    assert "exchanged label" not in power, "which was not asked for"
    # a check without power on these data says so
    weak = {f"power: {kind}" for kind, row in power.items() if not float(row["recall"]) >= 0.5}
    assert {row["check"] for row in findings if row["check"].startswith("power")} == weak


def test_the_command_line_names_what_is_wrong(pcam_dir, tmp_path, capsys):
    own, empty = tmp_path / "my own", tmp_path / "empty"
    write_pcam(own, 16, 8)
    empty.mkdir()
    out = str(tmp_path / "out")
    assert main(["data", str(own), "--out", out, "--checks", "files, values"]) == 0
    for arguments, words in (
        ((pcam_dir, "--checks", "valuse"), "'valuse' is unknown"),
        ((pcam_dir, "epochs=x"), "epochs"),
        ((tmp_path / "none",), "no such folder"),
        ((empty,), "is no PCam folder"),
        ((own, "--out", own), "may not be the data"),
    ):
        assert main(["data", "--out", out, *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
