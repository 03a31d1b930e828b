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

# of the folds, and what each learns from in all its epochs
NUM_FOLDS, EPOCHS, PATCHES_PER_FOLD = 4, 8, 15_000
PATCHES_PER_S = 150  # that a fold learns from on two cores; other machines differ


def train_folds(audit, overrides: list[str], device: str) -> list[Path]:
    """Run folders of folds trained in OUT/runs, by groups that are found first where there are
    none. Raises BadInput as train.py does.
    """
    if group_of_rows(open_split(audit.directory, "train"), audit.directory) is None:
        audit.add(check_groups(audit.directory))
    settings = {"name": "fold", "epochs": EPOCHS, "crop_epochs": EPOCHS, "views": 1}
    settings |= {"limit_train": PATCHES_PER_FOLD, "num_folds": NUM_FOLDS}
    settings |= {"quarantine": audit.out / "quarantine.csv"} | parse_overrides(overrides)
    settings["data_dir"] = audit.directory
    num_folds = int(settings["num_folds"])
    num_patches = num_folds * int(settings["epochs"]) * int(settings["limit_train"])
    minutes = num_patches / PATCHES_PER_S / 60
    say(f"training {num_folds} folds takes up to {minutes:.0f} minutes on two cores")
    options = ["--runs", audit.out / "runs", "--device", device]
    options += [f"{key}={value}" for key, value in settings.items()]
    return [make_run([*options, f"fold={fold}"]) for fold in range(num_folds)]


def predict_folds(directory, runs, device: str) -> np.ndarray:
    """Logits (N,) of the rows of train by the runs of its folds, NaN for a row that no run has held
    out. Raises BadInput for a run that is no fold, or of other data.
    """
    logits = np.full(len(open_split(directory, "train")), np.nan)
    target = choose_device(device)
    for run in runs:
        cfg = resume_config(Path(run), [f"data_dir={directory}"])
        if not cfg.num_folds:
            raise BadInput(f"{run} has num_folds=0, so it has learnt from all of train")
        _, (split, rows) = open_train_valid(cfg)
        source = PatchSource(split.images, cfg.data_residence, target)
        model = load_model(run)[0].to(target)
        logits[rows.index] = predict_rows(model, source, rows.index, cfg, cfg.views)
    return logits
