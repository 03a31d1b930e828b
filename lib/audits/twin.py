"""Twins: two runs of one configuration. Identical to the bit, or: the first step, quantity and layer at which they part."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audits import Finding
from lib.audits.replay import KINDS, Fault, train, ulp_distance
from lib.batches import PatchSource, open_train_valid
from lib.checkpoint import load_checkpoint, load_model
from lib.command import BadInput, say
from lib.config import Config
from lib.device import choose_device
from lib.logger import read_csv, read_json
from lib.predict import predict_rows
from lib.rundir import REPOSITORY, find_run, is_finished, resume_config
from lib.trace import KEPT, QUANTITIES

SHORT = {"epochs": "2", "limit_train": "2048", "limit_valid": "512", "checkpoint_every_steps": "4", "name": "twin"}
METRICS = ("val_auc", "val_pr_auc", "val_f2", "val_accuracy", "val_loss")


@dataclass(frozen=True)
class Side:
    """A run folder as one of the two: `trace` holds its rows by step."""

    run: Path
    cfg: Config
    meta: dict
    summary: dict
    trace: dict[int, dict]


def make_run(argv: list[str], fault: Fault | None = None) -> Path:
    """Train in a process of its own or, with a fault planted, in this one. Raises BadInput with the sentence it refused in."""
    if fault:
        return Path(train(argv, fault)[0]["run"])
    done = subprocess.run([sys.executable, str(REPOSITORY / "train.py"), *argv], stdout=subprocess.PIPE, text=True)
    result = json.loads((done.stdout.splitlines() or ["{}"])[-1])
    if done.returncode not in (0, 1) or "run" not in result:
        raise BadInput(result.get("error") or f"train.py ended with exit code {done.returncode}")
    return Path(result["run"])


def read_side(path) -> Side:
    """Read a run folder. Raises BadInput unless the run finished and its trace holds every step, or every Nth."""
    run = find_run(path)
    if not is_finished(run) or not (run / "trace.csv").is_file():
        raise BadInput(f"{run} did not finish, or has no trace.csv: only finished runs of train.py --trace are compared")
    summary, rows = read_json(run / "summary.json"), read_csv(run / "trace.csv")
    if lacking := [name for name in ("step", *QUANTITIES) if rows and name not in rows[0]]:
        raise BadInput(f"{run / 'trace.csv'} is of another version: it lacks the column {lacking[0]}")
    trace = {int(row["step"]) if row["step"].isdigit() else 0: row for row in rows}
    every = min(trace, default=0) or 1
    if missing := sorted(set(range(every, summary["num_steps"] + 1, every)) ^ set(trace)):
        raise BadInput(
            f"{run / 'trace.csv'} is cut: of {summary['num_steps']} steps, every {every}th, it lacks step {missing[0]}"
        )
    return Side(run, resume_config(run, []), read_json(run / "meta.json"), summary, trace)


def list_inputs(side: Side) -> dict:
    """What went in: config, data, code, packages, machine with driver and device, environment."""
    meta = side.meta
    code = {"commit": meta["commit"], "patch": hashlib.sha256(meta["uncommitted_patch"].encode()).hexdigest()[:12]}
    return side.cfg.as_dict() | meta["data"] | code | meta["versions"] | meta["machine"] | meta["variables"]


def compare_inputs(a: Side, b: Side) -> list[dict]:
    """What differs in what went in, [{what, a, b}]. Raises BadInput that names it if the two are no twins."""
    ours, theirs = list_inputs(a), list_inputs(b)
    rows = [{"what": name, "a": ours.get(name, "-"), "b": theirs.get(name, "-")} for name in {**ours, **theirs}]
    rows = [row for row in rows if row["a"] != row["b"] and row["what"] not in ("name", "memory_bytes")]
    if a.meta["identity"] != b.meta["identity"]:
        fixed = a.cfg.identity() | a.meta["data"] | b.meta["data"]
        differing = [f"{row['what']} is {row['a']} in one, {row['b']} in the other" for row in rows if row["what"] in fixed]
        raise BadInput(f"{a.run} and {b.run} are no twins: {(differing or ['a file that the config names differs'])[0]}")
    if list(a.trace) != list(b.trace):
        lengths = [f"{len(side.trace)} steps up to {max(side.trace, default=0)}" for side in (a, b)]
        raise BadInput(f"the traces of {a.run} and {b.run} are of other lengths: {lengths[0]}, and {lengths[1]}")
    return rows


def find_parting(a: Side, b: Side, quantities: list[str]) -> dict:
    """Step, quantity and layer that differ first, in time and then in the order of cause and effect; {} for none."""
    before, last = 0, a.summary["num_steps"]
    for step, ours in a.trace.items():
        differing = [name for name in ours if ours[name] != b.trace[step].get(name)]
        if quantity := next((name for name in quantities if name in differing), ""):
            layers = [name.partition(".")[2] for name in differing if name.startswith(f"{quantity}.")] or [""]
            layer = layers[-1 if quantity == "gradients" else 0]  # gradients come about from the last layer on
            return {"step": step, "equal_step": before, "quantity": quantity, "layer": layer}
        before = step
    if a.summary["weights_sha256"] == b.summary["weights_sha256"]:
        return {}
    return {"step": last, "equal_step": min(before, last - 1), "quantity": "parameters", "layer": ""}


def last_equal_checkpoint(a: Side, b: Side, step: int) -> Path | None:
    """The newest kept checkpoint up to `step`; None: the start of training. Raises BadInput for one of another run."""
    kept = {int(path.stem): path for side in (b, a) for path in (side.run / KEPT).glob("[0-9]*.pt")}
    if not (path := kept.get(max((number for number in kept if number <= step), default=None))):
        return None
    checkpoint = load_checkpoint(path)
    theirs = checkpoint["config"] | checkpoint["data"]
    for key, value in (a.cfg.identity() | a.meta["data"]).items():
        if theirs.get(key) != value:
            raise BadInput(f"{path} is no checkpoint of this run: {key} is {theirs.get(key)} there, {value} in the run")
    return path


def replay_parting(a: Side, b: Side, parting: dict, fault: Fault | None, device: str | None) -> dict:
    """Both runs once more to the step where they part, each on its device or on `device`: the first module with equal inputs
    and unequal output, forward or backward, and the distance."""
    checkpoint = last_equal_checkpoint(a, b, parting["equal_step"])
    window = range(parting["equal_step"] + 1, parting["step"] + 1)
    say(f"replaying steps {window[0]} to {window[-1]} from {checkpoint or 'the start'}")

    def again(side, fault=None, keep=None):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(a.run / "config.yaml", folder)
            if checkpoint:
                shutil.copy(checkpoint, Path(folder) / "last.pt")
            argv = ["--resume", folder, "--device", device or side.meta["machine"]["device"], f"data_dir={a.cfg.data_dir}"]
            return train(argv, fault, window, keep)[1:]

    try:
        (ours, _), (theirs, _) = again(a), again(b, fault)
    except BadInput as error:  # no data, or no such device here
        return {"not_replayed": str(error)}
    at = next((at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
    if at is None:
        return {"not_replayed": "both replays are equal on this machine"}
    found = dict(zip(("step", "phase", "module", "what"), ours[at], strict=False)) | {
        "started_from": str(checkpoint or "start")
    }
    (_, left), (_, right) = again(a, keep=at), again(b, fault, keep=at)
    if left.is_floating_point() and left.shape == right.shape and left.dtype == right.dtype:
        ulps = ulp_distance(left, right)
        found |= {"max_ulp": int(ulps.max()), "num_unequal": int((ulps > 0).sum()), "num_elements": ulps.numel()}
    return found


def flipped_predictions(a: Side, b: Side, device: str | None) -> dict:
    """Decisions at 0.5 of both best.pt on the validation rows; {} without the data or the checkpoints."""
    if not Path(a.cfg.data_dir).is_dir() or not all((side.run / "best.pt").is_file() for side in (a, b)):
        return {}
    where, (_, (split, rows)) = choose_device(device or "auto"), open_train_valid(a.cfg)
    source = PatchSource(split.images, a.cfg.data_residence, where)
    left, right = (predict_rows(load_model(side.run)[0].to(where), source, rows.index, a.cfg) for side in (a, b))
    num_flipped = int(((left >= 0) != (right >= 0)).sum())
    return {"num": len(rows), "num_flipped": num_flipped, "max_logit_difference": float(np.abs(left - right).max())}


def compare_metrics(a: Side, b: Side, seeds) -> list[dict]:
    """Scores of both beside the standard deviation over `seeds`, runs that differ in nothing but the seed."""
    summaries, rows = [a.summary, b.summary, *(read_json(find_run(run) / "summary.json") for run in seeds)], []
    for name in METRICS:
        ours, theirs, *others = (summary.get(name, math.nan) for summary in summaries)
        deviation = float(np.std(others, ddof=1)) if len(others) > 1 else math.nan
        rows.append({"score": name, "a": ours, "b": theirs, "difference": abs(ours - theirs), "seed deviation": deviation})
    return rows


def compare(a: Side, b: Side, fault: Fault | None = None, device: str | None = None, seeds=()) -> dict:
    """The verdict on two runs with all that a page shows; `fault` is what was planted in B, so that its replay has it too."""
    inputs = compare_inputs(a, b)
    # the generators on record are those of the first rank, which draws less the more ranks there are
    quantities = [name for name in QUANTITIES if name != "rng" or a.meta["num_ranks"] == b.meta["num_ranks"]]
    parting = find_parting(a, b, quantities)
    report = {"verdict": "parted" if parting else "identical", "num_steps_compared": len(a.trace), **parting}
    report["weights_equal"] = a.summary["weights_sha256"] == b.summary["weights_sha256"]
    equal = [[a.trace[step][name] == b.trace[step][name] for step in a.trace] for name in quantities]
    report |= {"inputs": inputs, "time_line": (quantities, list(a.trace), np.array(equal, bool))}
    report |= {"metrics": compare_metrics(a, b, seeds), "replay": {}, "flips": {}}
    if parting:
        differing = ", ".join(row["what"] for row in inputs)
        report["cause"] = QUANTITIES[parting["quantity"]] + (f"; the two runs differ in {differing}" if differing else "")
        if parting["quantity"] not in ("rows", "images", "draws"):  # those come before the model
            report["replay"] = replay_parting(a, b, parting, fault, device)
        report["flips"] = flipped_predictions(a, b, device)
    if fault:
        found = (report.get("step"), report["replay"].get("module", ""), report.get("quantity") in KINDS[fault.kind])
        report |= {"planted": vars(fault), "named": found == (fault.step, fault.layer, True)}
    return report


def twin_findings(report: dict) -> list[Finding]:
    """The report as findings: what differs in the inputs, where the runs part, the module, and what it does to predictions."""
    inputs, flips, replay = report["inputs"], report["flips"], report["replay"]
    measured = f"identical over {report['num_steps_compared']} steps"
    if parted := report["verdict"] == "parted":
        measured = f"part at step {report['step']} in {report['quantity']} {report['layer']}"
    advice = report.get("cause", "")
    findings = [
        Finding("inputs", "warning" if inputs else "note", len(inputs), f"{len(inputs)} differ", rows=inputs),
        Finding("time line", "error" if parted else "note", int(parted), measured, "identical", advice),
    ]
    if replay:
        measured = replay.get("not_replayed") or "{phase}: {what} of {module}".format(**replay)
        findings.append(Finding("replay", "error", 1, measured, rows=[replay]))
    if flips:
        findings.append(Finding("predictions", "note", flips["num_flipped"], "flipped", split="valid", rows=[flips]))
    return findings
