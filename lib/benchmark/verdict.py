"""What the rows of a benchmark say: which stage is the bottleneck and how far the machine's limit
is, and whether two runs differ by more than their noise."""

import math
from pathlib import Path

from lib.benchmark.timing import KEY
from lib.command import BadInput
from lib.files import read_json

# what a person can do something about, and the stages that it is made of
GROUPS = {
    "disk": ("read",),
    "loader": ("gather",),
    "transfer": ("transfer", "augment"),
    "model": ("forward", "backward", "optimiser"),
    "logging": ("logging",),
}
NAMES = {group: f"the {group}" for group in GROUPS}
NAMES |= {"transfer": "turning bytes into the model's input", "model": "the model's computing"}
# ways in which the repeats of two sides can be ordered: apart by chance in at most 5%
LEAST_ORDERS = 40
UNEXPLAINED = 1.25  # by this factor the pipeline may leave what its stages predict
NEEDED_COLUMNS = {*KEY, "low", "high", "num_repeats", "status"}
NEEDED = ("gather", "transfer", "forward", "backward", "optimiser")


def judge(rows: list[dict]) -> dict:
    """The verdict on training, computed from the stages timed apart: {first_epoch, later_epochs,
    sentence}.

    In the first epoch the file is cold; later ones find it in memory. `sentence` alone, where a
    stage has no number.
    """
    stages = {row["case"]: row for row in rows if row["what"] == "stage"}
    if lacking := [name for name in NEEDED if not stages.get(name, {}).get("images_per_s")]:
        return {
            "sentence": (
                f"No verdict: the stage {lacking[0]} has no number (train and all measure it,"
                " --cases only if named)."
            )
        }
    limits = [row for row in rows if row["what"] == "limit" or row["case"] == "read"]
    verdict = {"later_epochs": judge_epoch(stages, limits, stages.get("overlapped"), is_cold=False)}
    told = f"From memory, {verdict['later_epochs']['sentence']}."
    if stages.get("read", {}).get("images_per_s"):
        verdict["first_epoch"] = judge_epoch(
            stages, limits, stages.get("overlapped_cold"), is_cold=True
        )
        told = f"In the first epoch, from a cold file, {verdict['first_epoch']['sentence']}. {told}"
    if marked := [
        name for name, row in stages.items() if row.get("status") in ("noisy", "unsteady")
    ]:
        told += f" Noisy or unsteady: {', '.join(marked)}."
    return verdict | {"sentence": told}


def judge_epoch(stages: dict, limits: list[dict], overlapped: dict | None, is_cold: bool) -> dict:
    """The group of stages that a batch waits for, in the lane that takes longest: what loads in the
    background, or the rest.

    `expected_s` is what the stages predict for a batch, `overlapped_s` what the real pipeline took.
    """
    some, names = (
        stages["gather"],
        [name for group in GROUPS.values() for name in group if is_cold or name != "read"],
    )
    rates = {name: stages[name]["images_per_s"] for name in names if name in stages}
    seconds = {name: some["batch_size"] / rate for name, rate in rates.items() if rate}
    on_gpu, background = some["gpu"] != "none", ()
    # as PatchSource.can_stall
    if some["residence"] == "disk" or (some["residence"] == "host" and on_gpu):
        background = ("gather", *(["transfer"] if on_gpu else []))
        # else the file is read before the first step
        background += ("read",) if some["residence"] == "disk" else ()
    lanes = [
        {name: seconds[name] for name in seconds if (name in background) == ahead}
        for ahead in (True, False)
    ]
    lane = max(lanes, key=lambda lane: sum(lane.values()))
    group_s = {group: sum(lane.get(part, 0.0) for part in parts) for group, parts in GROUPS.items()}
    bottleneck = max(group_s, key=group_s.get)
    expected_s = sum(lane.values())
    measured = overlapped and overlapped["images_per_s"]
    rate = measured or some["batch_size"] / expected_s
    limit, words = find_limit(bottleneck, limits, stages.get("overlapped"))
    sentence = (
        f"{NAMES[bottleneck]} is the bottleneck: {group_s[bottleneck] * 1e3:.4g} of"
        f" {expected_s * 1e3:.4g} ms a batch"
    )
    sentence += f" of {some['batch_size']}, {rate:,.0f} images/s{'' if measured else ' expected'}"
    if measured and not 1 / UNEXPLAINED <= rate * expected_s / some["batch_size"] <= UNEXPLAINED:
        sentence += f", where the stages alone predict {some['batch_size'] / expected_s:,.0f}"
    if limit:
        sentence += (
            f"; the machine's limit for it ({words}) is {limit:,.0f} images/s, {limit / rate:.1f}"
            " times that"
        )
    found = {
        "bottleneck": bottleneck,
        "sentence": sentence,
        "stage_s": seconds,
        "expected_s": expected_s,
    }
    found |= {
        "overlapped_s": some["batch_size"] / measured if measured else None,
        "images_per_s": rate,
    }
    return found | {"limit_s": some["batch_size"] / limit if limit else None, "limit": words}


def find_limit(
    bottleneck: str, limits: list[dict], overlapped: dict | None
) -> tuple[float | None, str]:
    """Images per second that the machine would allow where the bottleneck is, and what was measured
    to know it.
    """
    if bottleneck == "model":
        alike, flops = ("case", "precision", "threads"), (overlapped or {}).get("flops_per_image")
        wanted = ["matrix_product", *((overlapped or {}).get(name) for name in alike[1:])]
        found = [row["flops_per_s"] for row in limits if [row[name] for name in alike] == wanted]
        return (found[0] / flops if found and found[0] and flops else None), "matrix product"
    rates = {row["case"]: row["images_per_s"] for row in limits if row["images_per_s"]}
    # in order is not the faster way on every disk
    ways = {
        "disk": sorted(("sequential_read", "read"), key=lambda name: -rates.get(name, 0.0)),
        "loader": ["memory_copy"],
    }
    ways["transfer"] = ["copy_to_device", "memory_copy"]
    name = next((name for name in ways.get(bottleneck, []) if name in rates), "")
    return rates.get(name), name.replace("_", " ")


def headline(rows: list[dict], what: str, model: str, batch_size: int) -> dict:
    """What the script's last line says at a glance, None where there is no number: images per
    second of the model, or of the loader and how often torchvision's with its best number of
    workers."""
    rows = [
        row
        for row in rows
        if row["batch_size"] == batch_size and row["cache"] == "warm" and row["images_per_s"]
    ]
    default = {
        row["what"]: row["images_per_s"]
        for row in rows
        if row["case"] == "default" and row["model"] == model
    }
    if what in ("infer", "train"):
        return {"images_per_s": default.get(what)}
    rates = {
        (row["case"], row["precision"]): row["images_per_s"]
        for row in rows
        if row["what"] == "loader"
    }
    # the best was measured again and again, the others once
    tried = [
        (row["num_repeats"], row["images_per_s"])
        for row in rows
        if row["case"].startswith("torchvision")
    ]
    plain, ready, raw = (
        max(tried, default=(0, None))[1],
        rates.get(("ready", "fp32")),
        rates.get(("raw", "fp32")),
    )
    found = {"images_per_s": ready, "torchvision_images_per_s": plain, "raw_images_per_s": raw}
    found |= {
        name: rate / plain if rate and plain else None
        for name, rate in (("ratio", ready), ("ratio_raw", raw))
    }
    return found | (
        {f"{verb}_images_per_s": default.get(verb) for verb in ("infer", "train")}
        if what == "all"
        else {}
    )


def read_rows(path) -> list[dict]:
    """The rows of a benchmark, from its folder or its JSON. Raises BadInput for what is none."""
    path = Path(path)
    path = path / "benchmark.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(
            f"{path}: no such benchmark (a folder that benchmark.py wrote, or its benchmark.json)"
        )
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() >= NEEDED_COLUMNS for row in rows
    ):
        raise BadInput(f"{path} is no benchmark: it has no rows of one")
    for row in rows:
        numbers = [row.get(name) for name in ("images_per_s", "flops_per_s", "low", "high")]
        keyed = isinstance(row["num_repeats"], int) and not any(
            isinstance(row[name], (list, dict)) for name in KEY
        )
        if not keyed or not all(
            value is None or isinstance(value, (int, float)) for value in numbers
        ):
            raise BadInput(f"{path} is damaged: a row has a rate, or a name, of a wrong type")
    return rows


def compare_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """For each row of both: the ratio of rates after / before, its interval, and whether it exceeds
    the noise.

    It does where the two intervals lie apart. With six repeats each, all of one side then beat all
    of the other, which chance alone brings about in 2 of 924 cases (Mann and Whitney 1947); of
    fewer than four nothing is told.
    """
    known, compared = {tuple(row[name] for name in KEY): row for row in before}, []
    for row in after:
        if (other := known.get(tuple(row[name] for name in KEY))) is None:
            continue
        old, new = (each.get("images_per_s") or each.get("flops_per_s") for each in (other, row))
        found = {name: row[name] for name in KEY} | {
            "before": old,
            "after": new,
            "ratio": new / old if old and new else None,
        }
        found |= dict.fromkeys(("low", "high", "exceeds"))
        orders = math.comb(other["num_repeats"] + row["num_repeats"], row["num_repeats"])
        if old and new and orders >= LEAST_ORDERS and other["low"] and row["low"]:
            found |= {"low": row["low"] / other["high"], "high": row["high"] / other["low"]}
            found["exceeds"] = not found["low"] <= 1 <= found["high"]
        compared.append(found | {"status": f"{other['status']}, {row['status']}"})
    if not compared:
        raise BadInput(
            "the two benchmarks have no row in common: compare runs of one model, batch size and"
            " variant"
        )
    return compared
