"""The champion in assets/: small, whole, and as good on real patches as its summary says."""

import pytest
from conftest import REAL_SAMPLE, REPOSITORY, run_script

from lib.checkpoint import load_model
from lib.files import file_digest, read_csv, read_json, write_json
from lib.rundir import read_run_config

CHAMPION = REPOSITORY / "assets" / "champion"


def test_the_champion_is_small_and_its_files_belong_together():
    _, cfg, checkpoint = load_model(CHAMPION)
    summary = read_json(CHAMPION / "summary.json")
    assert (CHAMPION / "best.pt").stat().st_size < 5_000_000 and summary["status"] == "finished"
    assert cfg == read_run_config(CHAMPION) and cfg.views == 8
    best = read_csv(CHAMPION / "epochs.csv")[summary["best_epoch"] - 1]
    assert (
        checkpoint["progress"]["best_scores"]["auc"] == float(best["val_auc"]) < summary["val_auc"]
    ), "of one view, and of eight"


@pytest.mark.slow
@pytest.mark.skipif(not REAL_SAMPLE.is_dir(), reason="needs ../shared/pcam-sample")
def test_real_patches_are_imported_and_ranked_as_the_champion_says(tmp_path):
    source, data = tmp_path / "in", tmp_path / "pcam"
    source.mkdir()
    (source / "valid.tar").symlink_to(REAL_SAMPLE / "valid.tar")
    run_script("prepare.py", "import", source, "--to", data, check=0)
    command = ("inference.py", "--ckpt", CHAMPION, data, "--split", "valid", "--views", 1)
    result = run_script(*command, "--out", tmp_path / "p.csv", check=0).json
    recorded = load_model(CHAMPION)[2]["progress"]["best_scores"]["auc"]
    assert result["num"] == 3000 and result["scores"]["auc"] == pytest.approx(recorded, abs=0.002)


@pytest.mark.slow
def test_make_champion_makes_a_run_the_champion_with_its_calibration_and_audit(
    quick_run, pcam_dir, tmp_path
):
    assets = tmp_path / "assets"
    options = ("--assets", assets, "--data", pcam_dir)
    run_script("jobs/champion.py", quick_run, *options, check=0)
    champion = assets / "champion"
    _, _, checkpoint = load_model(champion)
    meta = read_json(champion / "meta.json")
    assert checkpoint["calibration"] and "cwd" not in meta and "host" not in meta["machine"]
    audited = read_json(tmp_path / "audit-champion" / "scores.json")["checkpoint"]
    assert audited["sha256"] == file_digest(champion / "best.pt")
    before = {path: path.read_bytes() for path in champion.iterdir()}
    write_json(tmp_path / "plan.json", {})
    write_json(tmp_path / "champion.json", {"run": None, "note": "no champion: n"})
    assert "no champion" in run_script("jobs/champion.py", tmp_path, *options, check=2).stderr
    # one that cannot be audited does not take its place
    nowhere = ("--assets", assets, "--data", "nowhere")
    refused = run_script("jobs/champion.py", quick_run, *nowhere, check=2)
    assert refused.stderr.count("no folder nowhere") == 1
    assert before == {path: path.read_bytes() for path in champion.iterdir()}
    assert [path.name for path in assets.iterdir()] == ["champion"]
