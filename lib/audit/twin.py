"""Twins: two runs of one configuration. Identical to the bit, or: the first step, quantity and
layer at which they part.
"""

import hashlib
import json
import math
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audit import finding
from lib.audit.replay import KINDS, Fault, train, ulp_distance
from lib.batches import PatchSource, open_train_valid
from lib.checkpoint import load_checkpoint, load_model
from lib.command import BadInput, say
from lib.config import Config
from lib.device import choose_device
from lib.files import read_csv, read_json
from lib.predict import predict_rows
from lib.rundir import find_run, is_finished, resume_config
from lib.seeding import set_determinism
from lib.sources import locate_sources
from lib.trace import KEPT, QUANTITIES

SHORT = {
    "epochs": "2",
    "limit_train": "2048",
    "limit_valid": "512",
    "checkpoint_every_steps": "4",
    "name": "twin",
}
BEFORE_MODEL = ("rows", "images", "draws")  # quantities that no replay of the model explains
SCORES = ("val_auc", "val_pr_auc", "val_f2", "val_accuracy", "val_loss")


@dataclass(frozen=True)
class Side:
    """A run folder as one of the two: `trace` holds its rows by step."""

    run: Path
    cfg: Config
    meta: dict
    summary: dict
    trace: dict[int, dict]


def make_run(argv: list[str], fault: Fault | None = None) -> Path:
    """The run folder of a training in a process of its own, which does not outlive us. Raises
    BadInput as train.py does.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return Path(pool.submit(train, argv, fault).result()[0]["run"])
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def read_side(path) -> Side:
    """Read a run folder. Raises BadInput unless the run finished and its trace holds every step, or
    every Nth.
    """
    run = find_run(path)
    if not is_finished(run) or not (run / "trace.csv").is_file():
        raise BadInput(
            f"{run} did not finish, or has no trace.csv: only finished runs of train.py --trace are"
            " compared"
        )
    summary, rows = read_json(run / "summary.json"), read_csv(run / "trace.csv")
    if lacking := [name for name in ("step", *QUANTITIES) if rows and name not in rows[0]]:
        raise BadInput(
            f"{run / 'trace.csv'} is of another version: it lacks the column {lacking[0]}"
        )
    trace = {int(row["step"]) if row["step"].isdigit() else 0: row for row in rows}
    every = min(trace, default=0) or 1
    if missing := sorted(set(range(every, summary["num_steps"] + 1, every)) ^ set(trace)):
        told = f"of {summary['num_steps']} steps, every {every}th, it lacks step {missing[0]}"
        raise BadInput(f"{run / 'trace.csv'} is cut: {told}")
    return Side(run, resume_config(run, []), read_json(run / "meta.json"), summary, trace)


def list_inputs(side: Side) -> dict:
    """What went into a run: config, data, code, packages, machine with driver and device,
    environment.
    """
    patch = hashlib.sha256(side.meta["uncommitted_patch"].encode()).hexdigest()[:12]
    facts = side.cfg.as_dict() | {"commit": side.meta["commit"], "patch": patch}
    for place in ("data", "versions", "machine", "variables"):
        facts |= side.meta[place]
    return facts


def compare_inputs(a: Side, b: Side) -> list[dict]:
    """What differs in what went in. Raises BadInput that names it if the two are no twins."""
    ours, theirs = list_inputs(a), list_inputs(b)
    rows = []
    for name in {**ours, **theirs}:
        row = {"what": name, "a": ours.get(name, "-"), "b": theirs.get(name, "-")}
        if row["a"] != row["b"] and name not in ("name", "memory_bytes"):
            rows.append(row)
    if a.meta["identity"] != b.meta["identity"]:
        fixed = a.cfg.identity() | a.meta["data"] | b.meta["data"]
        reason = "a file that the config names, or groups.csv, differs"
        for row in reversed(rows):
            if row["what"] in fixed:
                reason = f"{row['what']} is {row['a']} in one, {row['b']} in the other"
        raise BadInput(f"{a.run} and {b.run} are no twins: {reason}")
    if list(a.trace) != list(b.trace):
        lengths = [f"{len(side.trace)} steps up to {max(side.trace, default=0)}" for side in (a, b)]
        raise BadInput(
            f"the traces of {a.run} and {b.run} are of other lengths: {lengths[0]}, and"
            f" {lengths[1]}"
        )
    return rows


def describe_side(name: str, side: Side) -> dict:
    """What a reader has to know of one of the two: where it is, of which code, on which machine,
    with which final weights.
    """
    machine = side.meta["machine"]
    return {
        "side": name,
        "run": side.run.name,
        "folder": str(side.run),
        "commit": side.meta["commit"],
        "host": machine.get("host"),
        "cpu": machine.get("cpu"),
        "device": machine.get("device"),
        "torch": side.meta["versions"]["torch"],
        "weights_sha256": side.summary["weights_sha256"],
    }


def find_parting(a: Side, b: Side) -> dict:
    """Step, quantity and layer that differ first, in time and then in the order of cause and
    effect; {} for none.
    """
    before, last = 0, a.summary["num_steps"]
    for step, ours in a.trace.items():
        differing = [name for name in ours if ours[name] != b.trace[step].get(name)]
        for quantity in QUANTITIES:
            if quantity in differing:
                names = [name for name in differing if name.startswith(f"{quantity}.")]
                layers = [name.partition(".")[2] for name in names] or [""]
                # gradients come about from the last layer on
                layer = layers[-1 if quantity == "gradients" else 0]
                return {"step": step, "equal_step": before, "quantity": quantity, "layer": layer}
        before = step
    if a.summary["weights_sha256"] == b.summary["weights_sha256"]:
        return {}
    equal_step = min(before, last - 1)
    return {"step": last, "equal_step": equal_step, "quantity": "parameters", "layer": ""}


def last_equal_checkpoint(a: Side, b: Side, step: int) -> Path | None:
    """The newest kept checkpoint up to `step`; None: the start of training. Raises BadInput for one
    of another run.
    """
    kept = {int(path.stem): path for side in (b, a) for path in (side.run / KEPT).glob("[0-9]*.pt")}
    path = kept.get(max((number for number in kept if number <= step), default=None))
    there = load_checkpoint(path) if path else {}
    for key, value in (a.cfg.identity() | a.meta["data"]).items() if path else ():
        if (other := (there["config"] | there["data"]).get(key)) != value:
            raise BadInput(
                f"{path} is no checkpoint of this run: {key} is {other} there, {value} in the run"
            )
    return path


def replay_parting(
    a: Side, b: Side, parting: dict, fault: Fault | None, device: str | None
) -> dict:
    """Both runs once more to the step where they part, each on its device or on `device`: the first
    module with equal inputs and unequal output, forward or backward, and the distance; {} if none
    differs here."""
    checkpoint = last_equal_checkpoint(a, b, parting["equal_step"])
    window = range(parting["equal_step"] + 1, parting["step"] + 1)
    say(f"replaying steps {window[0]} to {window[-1]} from {checkpoint or 'the start'}")

    def replay(side, fault=None, keep=None):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(a.run / "config.yaml", folder)
            if checkpoint:
                shutil.copy(checkpoint, Path(folder) / "last.pt")
            used = device or side.meta["machine"]["device"]
            argv = ["--resume", folder, "--device", used, f"data_dir={a.cfg.data_dir}"]
            _, events, tensor = train(argv, fault, window, keep)
            return events, tensor

    (ours, _), (theirs, _) = replay(a), replay(b, fault)
    unequal = [at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
    if not unequal:
        return {}
    first = unequal[0]
    (_, left), (_, right) = replay(a, keep=first), replay(b, fault, keep=first)
    step, phase, module, what, _ = ours[first]
    result = {"step": step, "phase": phase, "module": module, "what": what}
    result["replayed_from"] = str(checkpoint)
    if left.is_floating_point() and left.shape == right.shape and left.dtype == right.dtype:
        ulps = ulp_distance(left, right)
        result["max_ulp"] = int(ulps.max())
        result["num_unequal"] = int((ulps > 0).sum())
        result["num_elements"] = ulps.numel()
    return result


def flipped_predictions(a: Side, b: Side, device: str | None) -> dict:
    """Decisions at 0.5 of both best.pt on the validation rows."""
    set_determinism(a.cfg.deterministic)
    target = choose_device(device or "auto")
    _, (split, rows) = open_train_valid(a.cfg)
    source = PatchSource(split.images, a.cfg.data_residence, target)
    left, right = (
        predict_rows(load_model(side.run)[0].to(target), source, rows.index, a.cfg, 1)
        for side in (a, b)
    )
    num_flipped = int(((left >= 0) != (right >= 0)).sum())
    difference = float(np.abs(left - right).max())
    return {"num_flipped": num_flipped, "num": len(rows), "max_logit_difference": difference}


def compare_scores(a: Side, b: Side, seeds) -> list[dict]:
    """Scores of both beside the standard deviation over `seeds`, runs that differ in nothing but
    the seed.
    """
    others = [read_json(find_run(run) / "summary.json") for run in seeds]
    rows = []
    for name in SCORES:
        ours, theirs = a.summary.get(name, math.nan), b.summary.get(name, math.nan)
        row = {"score": name, "a": ours, "b": theirs, "difference": abs(ours - theirs)}
        values = [summary.get(name, math.nan) for summary in others]
        row["seed_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        rows.append(row)
    return rows


def compare(
    a: Side, b: Side, fault: Fault | None = None, device: str | None = None, seeds=()
) -> tuple[dict, list[dict]]:
    """The verdict on two runs, and the findings behind it. `fault` is what was planted in B: its
    replay has it too.
    """
    inputs, parting = compare_inputs(a, b), find_parting(a, b)
    is_equal = a.summary["weights_sha256"] == b.summary["weights_sha256"]
    weights = "equal" if is_equal else "not equal"
    verdict = "parted" if parting else "identical"
    result = {"verdict": verdict, "weights": weights, "num_steps": len(a.trace), **parting}
    findings = []

    def add(check: str, severity: str, measured: str, rows=(), **more) -> None:
        findings.append(finding(check, severity, measured, rows=rows, **more))

    sides = [describe_side("A", a), describe_side("B", b)]
    add("runs", "note", f"A is {a.run.name}, B is {b.run.name}", sides)
    add("inputs", "warning" if inputs else "note", f"{len(inputs)} differ", inputs)
    if not parting:
        add("time line", "note", f"identical to the bit over {len(a.trace):,} traced steps")
    else:
        causes = [QUANTITIES[parting["quantity"]]]
        causes += [f"they differ in {row['what']}" for row in inputs]
        result |= {"cause": "; ".join(causes), "replay": {}}
        place = f"{parting['quantity']} {parting['layer']}"
        measured = f"part at step {parting['step']}, first in {place}"
        advice = f"likely cause: {result['cause']}"
        add("time line", "error", measured, [parting], limit="identical", advice=advice)
        if not Path(a.cfg.data_dir).is_dir():
            measured = f"nothing replayed or predicted: there is no {a.cfg.data_dir} here"
            add("replay", "warning", measured)
        else:
            if parting["quantity"] not in BEFORE_MODEL:
                replayed = replay_parting(a, b, parting, fault, device)
                result["replay"] = replayed
                if replayed:
                    measured = "{phase}: {what} of {module}".format(**replayed)
                    add("replay", "error", measured, [replayed])
                else:
                    add("replay", "note", "equal twice on this machine")
            flips = flipped_predictions(a, b, device)
            result |= flips
            add("predictions", "note", f"{flips['num_flipped']} flipped", [flips], split="valid")
    add("scores", "note", f"final weights are {weights}", compare_scores(a, b, seeds))
    if fault:
        place = result.get("step"), result.get("replay", {}).get("module", "")
        is_kind = parting.get("quantity") in KINDS[fault.kind]
        result["named"] = place == (fault.step, fault.layer) and is_kind
        measured = f"planted: {fault}"
        if not parting:
            measured += "; it was rounded away: nothing that was traced differs, plant another"
        add("self-test", "note" if result["named"] else "error", measured, [vars(fault)])
    return result, findings


def require_own_folder(out: Path, is_injected: bool) -> None:
    """Make OUT. Raises BadInput where it holds a real comparison and a fault is to be planted, or
    the other way round."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "findings.json"
    checks = [row["check"] for row in json.loads(path.read_text())] if path.exists() else []
    if checks and ("self-test" in checks) != is_injected:
        kind = "a real comparison" if is_injected else "a comparison with a planted fault"
        raise BadInput(f"{out} holds {kind}: choose another --out")


def find_sources(repository: Path) -> list[dict]:
    """A finding for each source with the file:line of its control; an error where that statement is
    not there any more.
    """
    findings = []
    for row in locate_sources(lambda name: (repository / name).read_text()):
        measured = ", ".join(row["where"]) or f"no `{row['statement']}` in {row['file']}"
        rows = [{"where": where} for where in row["where"]]
        findings.append(
            finding(row["source"], "note" if rows else "error", measured, row["control"], rows=rows)
        )
    return findings
