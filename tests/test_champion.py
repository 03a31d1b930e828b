"""The champion in assets/: small, whole, and as good on real patches as its summary says."""

import tarfile

import pytest
import torch
from conftest import REAL_SAMPLE, REPOSITORY, draw_patches, real_sample, run_script

from lib.checkpoint import load_model
from lib.files import file_digest, read_csv, read_json
from lib.metrics import compute_auc
from lib.predict import predict_batch, ready_to_predict
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
def test_a_checkpoint_before_schema_3_predicts_to_the_bit_as_the_plain_last_layer_did():
    model, cfg, checkpoint = load_model(CHAMPION)
    assert torch.load(CHAMPION / "best.pt", weights_only=True)["schema"] == 2
    assert cfg.precision == "bf16"
    images = torch.from_numpy(draw_patches(16, 5)[0])
    ready = ready_to_predict(model, cfg.precision)

    def predict(views):
        return predict_batch(ready, images, cfg.precision, views, checkpoint["preprocessing"])

    one_view, eight_views = predict(1), predict(8)
    plain = torch.nn.Linear(model.head[1].in_features, 1).requires_grad_(False)
    plain.load_state_dict(model.head[1].state_dict())
    ready.head[1] = plain
    assert torch.equal(one_view, predict(1)) and torch.equal(eight_views, predict(8))
    assert torch.equal(one_view, one_view.bfloat16().float()), "its steps are those of bfloat16"


@pytest.mark.slow
@real_sample
def test_the_champion_ranks_real_patches(tmp_path):
    with tarfile.open(REAL_SAMPLE / "valid.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        for name in names[::10]:
            tar.extract(name, tmp_path, filter="data")
    out = tmp_path / "p.csv"
    run_script("inference.py", "--ckpt", CHAMPION, tmp_path / "valid", "--out", out, check=0)
    rows = read_csv(out)
    labels = [int(row["source"].split("/")[-2]) for row in rows]
    assert len(rows) == 300 and sum(labels) == 150
    auc = compute_auc(labels, [float(row["probability"]) for row in rows])
    assert auc == pytest.approx(read_json(CHAMPION / "summary.json")["val_auc"], abs=0.03)


@pytest.mark.slow
def test_make_champion_makes_a_run_the_champion_with_its_calibration_and_audit(
    quick_run, pcam_dir, tmp_path
):
    assets = tmp_path / "assets"
    options = ("--assets", assets, "--data", pcam_dir)
    for _ in range(2):  # the second one takes the place of the first
        run_script("jobs/champion.py", quick_run, *options, check=0)
    champion = assets / "champion"
    _, _, checkpoint = load_model(champion)
    meta = read_json(champion / "meta.json")
    assert checkpoint["calibration"] and "cwd" not in meta and "host" not in meta["machine"]
    audited = read_json(tmp_path / "audit-champion" / "scores.json")["checkpoint"]
    assert audited["sha256"] == file_digest(champion / "best.pt")
    before = {path: path.read_bytes() for path in champion.iterdir()}
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "champion.json").write_text('{"run": null, "note": "no champion: n"}')
    assert "no champion" in run_script("jobs/champion.py", tmp_path, *options, check=2).stderr
    nowhere = ("--assets", assets, "--data", "nowhere")
    refused = run_script("jobs/champion.py", quick_run, *nowhere, check=2)
    assert refused.stderr.count("no folder nowhere") == 1
    assert before == {path: path.read_bytes() for path in champion.iterdir()}
    assert [path.name for path in assets.iterdir()] == ["champion"]
