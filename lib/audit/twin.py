"""Twins: two runs of one configuration. Identical to the bit, or: the first step, quantity and
layer at which they part.
"""

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audit import finding
from lib.audit.replay import KINDS, Fault, train, ulp_distance
from lib.batches import PatchSource, open_train_valid
from lib.checkpoint import load_model
from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, run_script, say
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
    """The run folder of a training in a process of its own or, with a fault, in this one. Raises
    BadInput as train.py does.
    """
    if fault:
        return Path(train(argv, fault)[0]["run"])
    codes = (EXIT_DONE, EXIT_FINDING)  # a run that diverged has said where
    return Path(run_script("train.py", *argv, codes=codes, shows_progress=True)["run"])


def read_side(path) -> Side:
    """Read a run folder. Raises BadInput unless the run finished and its trace holds every step, or
    every Nth.
    """
    run = find_run(path)
    trace_path = run / "trace.csv"
    if not is_finished(run) or not trace_path.is_file():
        raise BadInput(
            f"{run} did not finish, or has no trace.csv: only finished runs of train.py --trace are"
            " compared"
        )
    summary = read_json(run / "summary.json")
    rows = read_csv(trace_path)
    for name in ("step", *QUANTITIES):
        if rows and name not in rows[0]:
            raise BadInput(f"{trace_path} is of another version: it lacks the column {name}")
    trace = {int(row["step"]): row for row in rows}
    every = min(trace, default=1)
    steps = range(every, summary["num_steps"] + 1, every)
    if list(trace) != list(steps):
        raise BadInput(f"{trace_path} is cut: it does not hold every step, or every {every}th")
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
    ours = list_inputs(a)
    theirs = list_inputs(b)
    rows = []
    for name in {**ours, **theirs}:
        row = {"what": name, "a": ours.get(name, "-"), "b": theirs.get(name, "-")}
        if row["a"] != row["b"] and name not in ("name", "memory_bytes"):
            rows.append(row)
    if a.meta["identity"] != b.meta["identity"]:
        fixed = a.cfg.identity() | a.meta["data"] | b.meta["data"]
        texts = [
            "{what} is {a} in one, {b} in the other".format(**row)
            for row in rows
            if row["what"] in fixed
        ]
        reason = "; ".join(texts) or "a file that the config names, or groups.csv, differs"
        raise BadInput(f"{a.run} and {b.run} are no twins: {reason}")
    if list(a.trace) != list(b.trace):
        lengths = f"{len(a.trace)} steps, and {len(b.trace)} steps"
        raise BadInput(f"the traces of {a.run} and {b.run} are of other lengths: {lengths}")
    return rows


def describe_side(name: str, side: Side) -> dict:
    """What a reader has to know of one of the two: where it is, of which code, on which machine,
    with which final weights.
    """
    facts = side.meta | side.meta["machine"] | side.meta["versions"] | side.summary
    row = {"side": name, "run": side.run.name, "folder": str(side.run)}
    keys = ("commit", "host", "cpu", "device", "torch", "weights_sha256")
    return row | {key: facts.get(key) for key in keys}


def find_parting(a: Side, b: Side) -> dict:
    """Step, quantity and layer that differ first, in time and then in the order of cause and
    effect; {} for none.
    """
    before = 0
    for step, ours in a.trace.items():
        differing = [name for name in ours if ours[name] != b.trace[step].get(name)]
        for quantity in QUANTITIES:
            if quantity in differing:
                layers = [name for name in differing if name.startswith(f"{quantity}.")] or [""]
                # gradients come about from the last layer on
                layer = layers[-1 if quantity == "gradients" else 0].partition(".")[2]
                return {"step": step, "equal_step": before, "quantity": quantity, "layer": layer}
        before = step
    if a.summary["weights_sha256"] == b.summary["weights_sha256"]:
        return {}
    last = a.summary["num_steps"]
    equal_step = min(before, last - 1)
    return {"step": last, "equal_step": equal_step, "quantity": "parameters", "layer": ""}


def replay_parting(
    a: Side, b: Side, parting: dict, fault: Fault | None, device: str | None
) -> dict:
    """Both runs once more, from the newest kept checkpoint to the step where they part, each on its
    device or on `device`: the first module with equal inputs and unequal output, forward or
    backward, and the distance; {} if none differs here."""
    window = range(parting["equal_step"] + 1, parting["step"] + 1)
    paths = [path for side in (a, b) for path in (side.run / KEPT).glob("[0-9]*.pt")]
    paths = [path for path in paths if int(path.stem) < window[0]]
    checkpoint = max(paths, key=lambda path: int(path.stem), default=None)
    say(f"replaying steps {window[0]} to {window[-1]} from {checkpoint or 'the start'}")

    def replay(side, fault=None, keep=None) -> tuple:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(a.run / "config.yaml", folder)
            if checkpoint:
                shutil.copy(checkpoint, Path(folder) / "last.pt")
            used = device or side.meta["machine"]["device"]
            argv = ["--resume", folder, "--device", used, f"data_dir={a.cfg.data_dir}"]
            return train(argv, fault, window, keep)

    _, ours, _ = replay(a)
    _, theirs, _ = replay(b, fault)
    is_equal = [left == right for left, right in zip(ours, theirs, strict=False)]
    if all(is_equal):
        return {}
    first = is_equal.index(False)
    *_, left = replay(a, keep=first)
    *_, right = replay(b, fault, keep=first)
    result = dict(zip(("step", "phase", "module", "what"), ours[first], strict=False))
    result["replayed_from"] = str(checkpoint)
    if left.is_floating_point():
        ulps = ulp_distance(left, right)
        result["max_ulp"] = int(ulps.max())
        result["num_unequal"] = int((ulps > 0).sum())
        result["num_elements"] = ulps.numel()
    return result


def compare_decisions(a: Side, b: Side, device: str | None) -> dict:
    """How many decisions at 0.5 on the validation rows differ between both best.pt."""
    set_determinism(a.cfg.deterministic)
    target = choose_device(device or "auto")
    _, (split, rows) = open_train_valid(a.cfg)
    source = PatchSource(split.images, a.cfg.data_residence, target)
    logits = []
    for side in (a, b):
        model = load_model(side.run)[0].to(target)
        logits.append(predict_rows(model, source, rows.index, a.cfg, 1))
    num_flipped = int(((logits[0] >= 0) != (logits[1] >= 0)).sum())
    difference = float(np.abs(logits[0] - logits[1]).max())
    return {"num_flipped": num_flipped, "num": len(rows), "max_logit_difference": difference}


def compare_scores(a: Side, b: Side, seeds) -> list[dict]:
    """Scores of both beside the standard deviation over `seeds`, two or more runs that differ in
    nothing but the seed.
    """
    others = [read_json(find_run(run) / "summary.json") for run in seeds]
    rows = []
    for name in SCORES:
        # a run that diverged in its first epoch has no scores
        ours, theirs = (side.summary.get(name, math.nan) for side in (a, b))
        row = {"score": name, "a": ours, "b": theirs, "difference": abs(ours - theirs)}
        if len(others) > 1:
            values = [summary.get(name, math.nan) for summary in others]
            row["seed_deviation"] = float(np.std(values, ddof=1))
        rows.append(row)
    return rows


def compare(
    a: Side, b: Side, fault: Fault | None = None, device: str | None = None, seeds=()
) -> tuple[dict, list[dict]]:
    """The verdict on two runs, and the findings behind it. `fault` is what was planted in B: its
    replay has it too.
    """
    inputs = compare_inputs(a, b)
    parting = find_parting(a, b)
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
        measured = "part at step {step}, first in {quantity} {layer}".format(**parting)
        advice = f"likely cause: {result['cause']}"
        add("time line", "error", measured, [parting], limit="identical", advice=advice)
        if not Path(a.cfg.data_dir).is_dir():
            add("replay", "warning", f"nothing replayed: there is no {a.cfg.data_dir} here")
        else:
            if parting["quantity"] not in BEFORE_MODEL:
                replayed = replay_parting(a, b, parting, fault, device)
                result["replay"] = replayed
                if replayed:
                    measured = "{phase}: {what} of {module}".format(**replayed)
                    add("replay", "error", measured, [replayed])
                else:
                    add("replay", "note", "equal twice on this machine")
            decisions = compare_decisions(a, b, device)
            result |= decisions
            measured = "{num_flipped} of {num} flipped".format(**decisions)
            add("predictions", "note", measured, [decisions], split="valid")
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
    if not path.exists():
        return
    checks = [row["check"] for row in json.loads(path.read_text())]
    if ("self-test" in checks) != is_injected:
        kind = "a real comparison" if is_injected else "a comparison with a planted fault"
        raise BadInput(f"{out} holds {kind}: choose another --out")


def find_sources(repository: Path) -> list[dict]:
    """A finding for each source with the file:line of its control; an error where that statement is
    not there any more.
    """
    findings = []
    for row in locate_sources(lambda name: (repository / name).read_text()):
        places = ", ".join(row["where"])
        if places:
            findings.append(finding(row["source"], "note", places, row["control"]))
        else:
            measured = f"no `{row['statement']}` in {row['file']}"
            findings.append(finding(row["source"], "error", measured, row["control"]))
    return findings
