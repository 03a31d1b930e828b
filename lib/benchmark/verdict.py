"""What the rows of a benchmark say: which stage is the bottleneck, how near the machine's limit it
is and what to do, and whether two runs differ by more than their noise.
"""

from collections import Counter
from pathlib import Path

from lib.benchmark.rounds import KEY
from lib.command import BadInput
from lib.config import Config
from lib.files import read_json

# what a person can do something about, by the stage, and the remedy
GROUPS = {
    "gather": "loader",
    "read": "disk",
    "augment": "augment",
    "forward": "model",
    "backward": "model",
    "optimiser": "model",
}
ADVICE = {
    "loader": "keep the patches in memory (data_residence=host, on a GPU device)",
    "disk": "copy the data to the node's own disk (STAGE_DATA=1) or read them once"
    " (data_residence=host)",
    "augment": "train on the centre of the patch for more epochs (crop, crop_epochs)",
    "model": "a faster processor or GPU, a smaller model, or a centre crop for more epochs (crop,"
    " crop_epochs); a faster disk or loader changes nothing",
}
MIN_REPEATS = 3  # of each side, or no difference is told


def judge(rows: list[dict]) -> dict:
    """The verdict: `sentences` on batch 1, the best batch, the bottleneck (`sentence` alone), and
    what to do; and {first_epoch, later_epochs}, what the bottleneck was judged by.

    In the first epoch the file is cold; later ones find it in memory.
    """
    rows = [row for row in rows if row["images_per_s"]]
    scaling = [row for row in rows if row["case"] == "default"]
    at_one = [row for row in scaling if row["batch_size"] == 1]
    best = {}
    for row in sorted(scaling, key=lambda row: row["images_per_s"]):
        best[row["what"], row["model"]] = row  # the last one, the fastest
    stages = {row["case"]: row for row in rows if row["what"] == "stage"}
    epochs, sentence, remedy = {}, "Bottleneck: not measured.", "`benchmark.py train` tells"
    if "apart" in stages:
        if "read" in stages:
            epochs["first_epoch"] = judge_epoch(stages)
            stages.pop("read")
        epochs["later_epochs"] = judge_epoch(stages)
        sentence = " ".join(map(describe_bottleneck, epochs, epochs.values()))
        remedy = ADVICE[epochs["later_epochs"]["bottleneck"]]
    sentences = [
        f"Batch 1: {list_rates(at_one)}.",
        f"Best batch: {list_rates(best.values())}.",
        sentence,
        f"What to do: {remedy}.",
    ]
    return {"sentence": sentence, "sentences": sentences, **epochs}


def list_rates(rows) -> str:
    """Rows in words."""
    words = "{what} {model} {images_per_s:,.4g} images/s at {batch_size}"
    return ", ".join(words.format(**row) for row in rows) or "not measured"


def judge_epoch(stages: dict) -> dict:
    """The group of stages that a batch waits for, in the lane that takes longest: what loads in the
    background, or the rest. All seconds are of a batch.
    """
    apart = stages["apart"]
    background = ()
    if apart["residence"] == "disk":  # as load_batches does it
        background = ("read", "gather")
    elif apart["residence"] == "host" and apart["gpu"] != "none":
        background = ("gather",)
    stage_s = {}
    lanes = (Counter(), Counter())
    for stage, group in GROUPS.items():
        if stage in stages:
            seconds = apart["batch_size"] / stages[stage]["images_per_s"]
            if stage == "read":  # from a cold file into a batch
                seconds = max(0.0, seconds - stage_s["gather"])
            stage_s[stage] = seconds
            lanes[stage in background][group] += seconds
    lane = max(lanes, key=Counter.total)
    ((bottleneck, bottleneck_s),) = lane.most_common(1)
    return {
        "bottleneck": bottleneck,
        "bottleneck_s": bottleneck_s,
        "expected_s": lane.total(),
        "stage_s": stage_s,
    }


def describe_bottleneck(name: str, epoch: dict) -> str:
    """The bottleneck of the first or later epochs, in words."""
    part_ms, whole_ms = 1e3 * epoch["bottleneck_s"], 1e3 * epoch["expected_s"]
    share = f"{epoch['bottleneck']}, {part_ms:.4g} of {whole_ms:.4g} ms a batch"
    return f"Bottleneck of the {name.replace('_', ' ')}: {share}."


def headline(rows: list[dict], what: str, cfg: Config, batch_size: int) -> dict:
    """What the script's last line says at a glance, None where there is no number: images per
    second of the model, or of the loader and how often torchvision's with its best number of
    workers.
    """
    verb = what if what in ("infer", "train") else "loader"
    here = {"what": verb, "model": cfg.model, "batch_size": batch_size, "cache": "warm"}
    rates, factors = {}, {}
    for row in rows:
        if row["images_per_s"] and here.items() <= row.items():
            rates[row["case"]] = row["images_per_s"]
            factors[row["case"]] = row["factor"]
    if verb != "loader":
        return {"images_per_s": rates.get("default")}
    theirs = [rates[case] for case in rates if case.startswith("torchvision")]
    return {
        "images_per_s": rates.get("ready"),
        "torchvision_images_per_s": max(theirs, default=None),
        "ratio": factors.get("ready"),
        "ratio_raw": factors.get("raw"),
    }


def read_rows(path) -> dict[tuple, dict]:
    """The rows of a benchmark by their key, from its folder or its JSON. Raises BadInput for what
    is none.
    """
    path = Path(path, "benchmark.json") if Path(path).is_dir() else path
    try:
        return {tuple(row[name] for name in KEY): row for row in read_json(path)["rows"]}
    except (TypeError, KeyError):
        raise BadInput(f"{path} is no benchmark: it has no rows of one") from None


def compare_rows(before: dict[tuple, dict], after: dict[tuple, dict]) -> list[dict]:
    """For each row of both: the ratio of rates after / before, its interval, and whether it exceeds
    the noise: the two intervals lie apart, each of three repeats or more.

    Chance alone sets the intervals of three repeats apart in about 1% of pairs.
    """
    compared = [compare(before[key], after[key]) for key in after if key in before]
    if not compared:
        raise BadInput("the two benchmarks have no row in common: compare alike ones")
    return compared


def compare(old: dict, new: dict) -> dict:
    """Two rows of one key: the ratio with its interval, and whether the new one is faster."""
    compared = {name: new[name] for name in KEY}
    compared |= {"status": f"{old['status']}, {new['status']}", "B is": "cannot be told"}
    before = old["images_per_s"] or old["flops_per_s"]
    after = new["images_per_s"] or new["flops_per_s"]
    num_repeats = min(old["num_repeats"], new["num_repeats"])
    if before and after and num_repeats >= MIN_REPEATS:
        low, high = new["low"] / old["high"], new["high"] / old["low"]
        answer = "faster" if low > 1 else "slower" if high < 1 else "within the noise"
        compared |= {"ratio": after / before, "low": low, "high": high, "B is": answer}
    return compared
