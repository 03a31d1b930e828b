"""Out-of-fold predictions by runs of train.py: those that a team has trained, or folds trained
here.
"""

from pathlib import Path

import numpy as np

from lib.audit.data.groups import check_groups
from lib.audit.twin import make_run
from lib.batches import PatchSource, open_train_valid
from lib.checkpoint import load_model
from lib.command import BadInput, say
from lib.config import parse_overrides
from lib.device import choose_device
from lib.groups import group_of_rows
from lib.pcam import open_split
from lib.predict import predict_rows
from lib.rundir import resume_config

# what a fold learns from, all epochs together
NUM_FOLDS, PATCHES_PER_FOLD, MOST_EPOCHS = 4, 120_000, 12
PATCHES_PER_S = 150  # that a fold learns from on two cores; other machines differ


def train_folds(audit, overrides: list[str], device: str) -> list:
    """Run folders of folds trained in OUT/runs, by groups that are found first where there are
    none. Raises BadInput as train.py does.
    """
    directory, out = audit.directory, audit.out
    train = open_split(directory, "train")
    if group_of_rows(train, directory) is None:
        audit.add(check_groups(directory))
    num_folds = audit.cfg.num_folds or NUM_FOLDS
    num_train = len(train) * (num_folds - 1) // num_folds
    epochs = int(np.clip(PATCHES_PER_FOLD // max(num_train, 1), 1, MOST_EPOCHS))
    limit = min(PATCHES_PER_FOLD, num_train)
    settings = {"name": "fold", "epochs": epochs, "crop_epochs": epochs, "views": 1}
    settings |= {"quarantine": out / "quarantine.csv", "limit_train": limit}
    settings |= parse_overrides(overrides)
    settings |= {"data_dir": directory, "num_folds": num_folds}
    minutes = num_folds * int(settings["epochs"]) * limit / PATCHES_PER_S / 60
    say(f"training {num_folds} folds takes about {minutes:.0f} minutes on two cores")
    runs = []
    for fold in range(num_folds):
        say(f"training fold {fold + 1} of {num_folds}")
        overridden = [f"{key}={value}" for key, value in settings.items()]
        argv = ["--runs", str(out / "runs"), "--device", device, *overridden, f"fold={fold}"]
        runs.append(make_run(argv))
    return runs


def predict_folds(audit, runs, device: str) -> np.ndarray:
    """Logits (N,) of the rows of train by the runs of its folds, NaN for a row that no run has held
    out. Raises BadInput for a run that is no fold, or of other data.
    """
    logits = np.full(len(open_split(audit.directory, "train")), np.nan)
    for run in runs:
        cfg = resume_config(Path(run), [f"data_dir={audit.directory}"])
        if not cfg.num_folds:
            raise BadInput(f"{run} has num_folds=0, so it has learnt from all of train")
        _, (split, rows) = open_train_valid(cfg)
        target = choose_device(device)
        source = PatchSource(split.images, cfg.data_residence, target)
        model = load_model(run)[0].to(target)
        logits[rows.index] = predict_rows(model, source, rows.index, cfg, cfg.views)
    return logits
