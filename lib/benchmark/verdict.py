"""What the rows of a benchmark say: which stage is the bottleneck, how near the machine's limit it
is and what to do, and whether two runs differ by more than their noise.
"""

from collections import Counter
from pathlib import Path

from lib.benchmark.rounds import KEY
from lib.command import BadInput
from lib.config import Config
from lib.files import read_json

# what a person can do something about, by the stage: its name, its limit, the remedy
GROUPS = {
    "gather": "loader",
    "read": "disk",
    "augment": "augment",
    "forward": "model",
    "backward": "model",
    "optimiser": "model",
    "logging": "logging",
}
NAMES = {
    "loader": "the loader",
    "disk": "the disk",
    "augment": "turning bytes into the model's input",
    "model": "the model's computing",
    "logging": "the logging",
}
ADVICE = {
    "loader": "keep the patches in memory (data_residence=host, on a GPU device)",
    "disk": "copy the data to the node's own disk (STAGE_DATA=1) or read them once"
    " (data_residence=host)",
    "augment": "train on the centre of the patch for more epochs (crop, crop_epochs)",
    "model": "a faster processor or GPU, a smaller model, or a centre crop for more epochs (crop,"
    " crop_epochs); a faster disk or loader changes nothing",
    "logging": "put the run folder on a faster disk (--runs)",
}
MIN_REPEATS = 3  # of each side, or no difference is told


def judge(rows: list[dict]) -> dict:
    """The verdict: `sentences` on batch 1, the best batch, the bottleneck (`sentence` alone) and
    what to do; and {first_epoch, later_epochs}, what the bottleneck was judged by.

    In the first epoch the file is cold; later ones find it in memory.
    """
    rows = [row for row in rows if row["images_per_s"]]
    scaling = [row for row in rows if row["case"] == "default"]
    scaling.sort(key=lambda row: (row["what"], row["model"], row["images_per_s"]))
    best = {(row["what"], row["model"]): row for row in scaling}  # the last one, the fastest
    at_one = [row for row in scaling if row["batch_size"] == 1]
    stages = {row["case"]: row for row in rows if row["what"] == "stage"}
    epochs, sentence, remedy = {}, "Bottleneck: not measured.", "`benchmark.py train` tells"
    if "apart" in stages:
        in_memory = {name: stage for name, stage in stages.items() if name != "read"}
        if "read" in stages:
            epochs["first_epoch"] = judge_epoch(stages)
        epochs["later_epochs"] = judge_epoch(in_memory)
        sentence = describe_bottleneck(epochs, stages, scaling)
        remedy = ADVICE[epochs["later_epochs"]["bottleneck"]]
    sentences = [
        f"Batch 1: {list_rates(at_one)}.",
        f"Best batch: {list_rates(best.values())}.",
        sentence,
        f"What to do: {remedy}.",
    ]
    for row in rows:
        if (row["case"], row["precision"]) == ("ready", "fp32") and row["factor"]:
            rate = f"{row['images_per_s']:,.0f} patches/s ready for the model"
            sentences.append(f"Loader: {rate}, {row['factor']:.3g} times torchvision's best.")
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
    if apart["residence"] == "disk":  # as PatchSource.can_stall
        background = ("read", "gather")
    elif apart["residence"] == "host" and apart["gpu"] != "none":
        background = ("gather",)
    stage_s, lanes = {}, (Counter(), Counter())
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


def describe_bottleneck(epochs: dict, stages: dict, scaling: list[dict]) -> str:
    """The bottlenecks in words, and beside them what a whole step took, with nothing apart."""
    size, model = stages["apart"]["batch_size"], stages["apart"]["model"]
    sentences = []
    for name, epoch in epochs.items():
        file = f"{stages['read']['cache']} file" if name == "first_epoch" else "from memory"
        sentences.append(
            f"Bottleneck of the {name.replace('_', ' ')} ({file}): {NAMES[epoch['bottleneck']]},"
            f" {1e3 * epoch['bottleneck_s']:.4g} of {1e3 * epoch['expected_s']:.4g} ms a batch of"
            f" {size}."
        )
    for row in scaling:
        if (row["what"], row["model"], row["batch_size"]) == ("train", model, size):
            step_ms = 1e3 * size / row["images_per_s"]
            share = row["share_of_peak"]
            limit = f", {share:.0%} of the fastest matrix product measured here" if share else ""
            sentences.append(f"All of it overlapped takes {step_ms:.4g} ms{limit}.")
    marked = [name for name, row in stages.items() if row["status"] != "ok"]
    if marked:
        sentences.append(f"Noisy or unsteady: {', '.join(marked)}.")
    return " ".join(sentences)


def headline(rows: list[dict], what: str, cfg: Config, batch_size: int) -> dict:
    """What the script's last line says at a glance, None where there is no number: images per
    second of the model, or of the loader and how often torchvision's with its best number of
    workers.
    """
    verb = what if what in ("infer", "train") else "loader"
    here = {"what": verb, "model": cfg.model, "batch_size": batch_size, "cache": "warm"}
    here["precision"] = "fp32" if verb == "loader" else cfg.precision
    cells = {row["case"]: row for row in rows if here.items() <= row.items()}
    if verb != "loader":
        return {"images_per_s": cells.get("default", {}).get("images_per_s")}
    raw, ready = cells.get("raw", {}), cells.get("ready", {})
    rate, ratio = ready.get("images_per_s"), ready.get("factor")
    return {
        "images_per_s": rate,
        "torchvision_images_per_s": rate / ratio if ratio else None,
        "ratio": ratio,
        "ratio_raw": raw.get("factor"),
    }


def read_rows(path) -> dict[tuple, dict]:
    """The rows of a benchmark by their key, from its folder or its JSON. Raises BadInput for what
    is none.
    """
    path = Path(path)
    path = path / "benchmark.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(
            f"{path}: no such benchmark (a folder that benchmark.py wrote, or its benchmark.json)"
        )
    try:
        return {tuple(row[name] for name in KEY): row for row in read_json(path)["rows"]}
    except (TypeError, KeyError):
        raise BadInput(f"{path} is no benchmark: it has no rows of one") from None


def compare_rows(before: dict[tuple, dict], after: dict[tuple, dict]) -> list[dict]:
    """For each row of both: the ratio of rates after / before, its interval, and whether it exceeds
    the noise: the two intervals lie apart, each of three repeats or more.

    Chance alone sets the intervals of three repeats apart in about 1% of pairs.
    """
    compared = []
    for key in after:
        if key in before:
            compared.append(dict(zip(KEY, key, strict=True)) | compare(before[key], after[key]))
    if not compared:
        raise BadInput("the two benchmarks have no row in common: compare alike ones")
    return compared


def compare(old: dict, new: dict) -> dict:
    """Two rows of one key: their rates, the ratio with its interval, and whether the new one is
    faster.
    """
    before, after = (row["images_per_s"] or row["flops_per_s"] for row in (old, new))
    ratios = dict.fromkeys(("ratio", "low", "high"))
    answer = "cannot be told"
    num_repeats = min(old["num_repeats"], new["num_repeats"])
    if before and after and num_repeats >= MIN_REPEATS:
        low, high = new["low"] / old["high"], new["high"] / old["low"]
        ratios = {"ratio": after / before, "low": low, "high": high}
        answer = "faster" if low > 1 else "slower" if high < 1 else "within the noise"
    status = f"{old['status']}, {new['status']}"
    return {"before": before, "after": after, **ratios, "status": status, "B is": answer}
