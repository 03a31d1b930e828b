"""What the rows of a benchmark say: which stage is the bottleneck, how near the machine's limit it
is and what to do, and whether two runs differ by more than their noise.
"""

from pathlib import Path

from lib.benchmark.rounds import KEY
from lib.command import BadInput
from lib.config import Config
from lib.files import read_json

# what a person can do something about: its stages, and in words: its name, its limit, the remedy
GROUPS = {
    "loader": ("gather",),
    "disk": ("read",),
    "augment": ("augment",),
    "model": ("forward", "backward", "optimiser"),
    "logging": ("logging",),
}
NAMES = {
    "disk": "the disk",
    "loader": "the loader",
    "augment": "turning bytes into the model's input",
    "model": "the model's computing",
    "logging": "the logging",
}
LIMITS = {
    "disk": "reading the file in order",
    "loader": "a copy of memory",
    "model": "the fastest matrix product measured here",
}
ADVICE = {
    "disk": "copy the data to the node's own disk (STAGE_DATA=1) or read them once"
    " (data_residence=host)",
    "loader": "keep the patches in memory (data_residence=host, on a GPU device)",
    "augment": "train on the centre of the patch for more epochs (crop, crop_epochs)",
    "model": "a GPU, a smaller model or a centre crop for more epochs (crop, crop_epochs); a faster"
    " disk or loader changes nothing",
    "logging": "put the run folder on a faster disk (--runs)",
}
MIN_REPEATS = 3  # of each side, or no difference is told


def judge(rows: list[dict]) -> dict:
    """The verdict: `sentences` on batch 1, the best batch, the bottleneck (`sentence` alone) and
    what to do; and {first_epoch, later_epochs}, what the bottleneck was judged by.

    In the first epoch the file is cold; later ones find it in memory.
    """
    measured = [row for row in rows if row["images_per_s"]]
    scaling = {}
    for row in measured:
        if row["case"] == "default":
            scaling.setdefault(f"{row['what']} {row['model']}", []).append(row)
    at_one, best = [], []
    for name, series in scaling.items():
        fastest = max(series, key=lambda row: row["images_per_s"])
        best.append(f"{name} {fastest['batch_size']} ({fastest['images_per_s']:,.4g})")
        at_one += [f"{name} {row['images_per_s']:,.4g}" for row in series if row["batch_size"] == 1]
    verdict = judge_training(measured)
    remedy = "`benchmark.py train` tells"
    if "later_epochs" in verdict:
        remedy = ADVICE[verdict["later_epochs"]["bottleneck"]]
    verdict["sentences"] = [
        f"Images/s at batch 1: {', '.join(at_one) or 'not measured'}.",
        f"Best batch, and its images/s: {', '.join(best) or 'not measured'}.",
        verdict["sentence"],
        f"What to do: {remedy}.",
    ]
    return verdict


def judge_training(measured: list[dict]) -> dict:
    """The bottleneck of training, from rows with a rate: {sentence, first_epoch, later_epochs},
    the first one alone where a stage is lacking.
    """
    stages = {row["case"]: row for row in measured if row["what"] == "stage"}
    if "apart" not in stages:
        return {"sentence": "Bottleneck: not measured."}
    whole = {}
    for row in measured:
        is_same = all(row[name] == stages["apart"][name] for name in ("model", "batch_size"))
        if (row["what"], row["case"]) == ("train", "default") and is_same:
            whole = row
    later = judge_epoch(stages, whole, is_cold=False)
    sentence = f"From memory, {later['sentence']}."
    verdict = {"later_epochs": later}
    if "read" in stages:
        first = judge_epoch(stages, stages.get("overlapped_cold", {}), is_cold=True)
        cache = stages["read"]["cache"]  # cold, or eviction requested
        sentence = f"In the first epoch ({cache} file), {first['sentence']}. {sentence}"
        verdict = {"first_epoch": first, "later_epochs": later}
    marked = [name for name, row in stages.items() if row["status"] != "ok"]
    if marked:
        sentence += f" Noisy or unsteady: {', '.join(marked)}."
    return {"sentence": sentence, **verdict}


def judge_epoch(stages: dict, whole: dict, is_cold: bool) -> dict:
    """The group of stages that a batch waits for, in the lane that takes longest: what loads in the
    background, or the rest.

    `expected_s` is what the stages predict for a batch, `overlapped_s` what the pipeline took.
    """
    apart = stages["apart"]
    size, background = apart["batch_size"], ()
    if apart["residence"] == "disk":  # as PatchSource.can_stall
        background = ("read", "gather")
    elif apart["residence"] == "host" and apart["gpu"] != "none":
        background = ("gather",)
    stage_s, lanes = {}, ({}, {})
    for group, names in GROUPS.items():
        for name in names:
            if name in stages and (is_cold or name != "read"):
                stage_s[name] = size / stages[name]["images_per_s"]
                if name == "read":  # from a cold file into a batch
                    stage_s[name] = max(0.0, stage_s[name] - stage_s["gather"])
                lane = lanes[name in background]
                lane[group] = lane.get(group, 0.0) + stage_s[name]
    lane = max(lanes, key=lambda lane: sum(lane.values()))
    bottleneck = max(lane, key=lane.get)
    expected_s = sum(lane.values())
    sentence = (
        f"{NAMES[bottleneck]} is the bottleneck: {1e3 * lane[bottleneck]:.4g} of"
        f" {1e3 * expected_s:.4g} ms a batch of {size}"
    )
    rate = whole.get("images_per_s")
    if rate:
        sentence += f"; all overlapped, {1e3 * size / rate:.4g} ms ({rate:,.0f} images/s)"
    limited = whole if bottleneck == "model" else stages[GROUPS[bottleneck][0]]
    share = limited.get("share_of_peak")
    if share:
        sentence += f"; {share:.0%} of {LIMITS[bottleneck]}"
    return {
        "bottleneck": bottleneck,
        "sentence": sentence,
        "stage_s": stage_s,
        "expected_s": expected_s,
        "overlapped_s": size / rate if rate else None,
        "share_of_peak": share,
    }


def headline(rows: list[dict], what: str, cfg: Config, batch_size: int) -> dict:
    """What the script's last line says at a glance, None where there is no number: images per
    second of the model, or of the loader and how often torchvision's with its best number of
    workers.
    """
    cells, torchvision = {}, []
    wanted = (cfg.model, batch_size, "warm")
    for row in rows:
        if (row["model"], row["batch_size"], row["cache"]) == wanted:
            cells[row["what"], row["case"], row["precision"]] = row
            if row["case"].startswith("torchvision"):
                torchvision.append(row["images_per_s"] or 0.0)
    result = {}
    for verb in ("infer", "train"):
        default = cells.get((verb, "default", cfg.precision), {})
        result[f"{verb}_images_per_s"] = default.get("images_per_s")
    if what in ("infer", "train"):
        return {"images_per_s": result[f"{what}_images_per_s"]}
    ready = cells.get(("loader", "ready", "fp32"), {})
    raw = cells.get(("loader", "raw", "fp32"), {})
    return {
        "images_per_s": ready.get("images_per_s"),
        "torchvision_images_per_s": max(torchvision, default=None),
        "ratio": ready.get("factor"),
        "raw_images_per_s": raw.get("images_per_s"),
        "ratio_raw": raw.get("factor"),
        **result,
    }


def read_rows(path) -> list[dict]:
    """The rows of a benchmark, from its folder or its JSON. Raises BadInput for what is none."""
    path = Path(path)
    path = path / "benchmark.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(
            f"{path}: no such benchmark (a folder that benchmark.py wrote, or its benchmark.json)"
        )
    try:
        return [row | {"key": tuple(row[name] for name in KEY)} for row in read_json(path)["rows"]]
    except (TypeError, KeyError):
        raise BadInput(f"{path} is no benchmark: it has no rows of one") from None


def compare_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """For each row of both: the ratio of rates after / before, its interval, and whether it exceeds
    the noise: the two intervals lie apart, each of three repeats or more.

    Chance alone sets the intervals of three repeats apart in about 1% of pairs.
    """
    rows_before = {row["key"]: row for row in before}
    compared = []
    for row in after:
        other = rows_before.get(row["key"])
        if not other:
            continue
        old, new = (side["images_per_s"] or side["flops_per_s"] for side in (other, row))
        comparison = {name: row[name] for name in KEY}
        comparison |= {"before": old, "after": new, "ratio": None, "low": None, "high": None}
        comparison |= {"status": f"{other['status']}, {row['status']}", "B is": "cannot be told"}
        if old and new and min(other["num_repeats"], row["num_repeats"]) >= MIN_REPEATS:
            low, high = row["low"] / other["high"], row["high"] / other["low"]
            comparison |= {"ratio": new / old, "low": low, "high": high}
            comparison["B is"] = "within the noise"
            if not low <= 1 <= high:
                comparison["B is"] = "faster" if low > 1 else "slower"
        compared.append(comparison)
    if not compared:
        raise BadInput(
            "the two benchmarks have no row in common: compare runs of one model, batch size and"
            " variant"
        )
    return compared
