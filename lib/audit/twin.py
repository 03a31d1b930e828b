"""Twins: two runs of one configuration. Identical to the bit, or: the first step, quantity and
layer at which they part.
"""

import hashlib
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.audit import finding
from lib.audit.replay import KINDS, Fault, train
from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, run_script, say
from lib.config import Config
from lib.evidence import holds_self_test
from lib.files import read_csv, read_json
from lib.rundir import find_run, is_finished, resume_config
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
    trace: dict


def make_run(argv: list[str], fault: Fault | None = None) -> Path:
    """The run folder of a training in a process of its own or, with a fault, in this one. Raises
    BadInput as train.py does.
    """
    if fault:
        return Path(train(argv, fault)[0]["run"])
    codes = (EXIT_DONE, EXIT_FINDING)  # a run that diverged has said where
    return Path(run_script("train.py", *argv, codes=codes, shows_progress=True)["run"])


def read_side(path) -> Side:
    """Read a run folder. Raises BadInput unless the run finished and has a trace."""
    run = find_run(path)
    trace_path = run / "trace.csv"
    if not is_finished(run) or not trace_path.is_file():
        raise BadInput(
            f"{run} did not finish, or has no trace.csv: only finished runs of train.py --trace are"
            " compared"
        )
    trace = {int(row["step"]): row for row in read_csv(trace_path)}
    meta = read_json(run / "meta.json")
    return Side(run, resume_config(run, []), meta, read_json(run / "summary.json"), trace)


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
        fixed_rows = [row for row in rows if row["what"] in fixed]
        texts = ["{what} is {a} in one, {b} in the other".format(**row) for row in fixed_rows]
        reason = "; ".join(texts) or "a file that the config names, or groups.csv, differs"
        raise BadInput(f"{a.run} and {b.run} are no twins: {reason}")
    if list(a.trace) != list(b.trace):
        raise BadInput(
            f"the traces of {a.run} and {b.run} hold other steps: {len(a.trace)} and {len(b.trace)}"
            " in number"
        )
    return rows


def find_parting(a: Side, b: Side) -> dict:
    """Step, quantity and layer that differ first, in time and then in the order of cause and
    effect, and the last equal step; {} for none.
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
    last = a.summary["num_steps"]  # after the last traced one
    equal_step = min(before, last - 1)
    return {"step": last, "equal_step": equal_step, "quantity": "parameters", "layer": ""}


def replay_parting(
    a: Side, b: Side, parting: dict, fault: Fault | None, device: str | None
) -> dict:
    """Both runs once more, from the newest kept checkpoint to the step where they part, each on its
    device or on `device`: the first module with equal inputs and unequal output, forward or
    backward; {} if none differs here."""
    window = range(parting["equal_step"] + 1, parting["step"] + 1)
    earlier = [path for path in sorted((a.run / KEPT).glob("*.pt")) if int(path.stem) < window[0]]
    checkpoint = earlier[-1] if earlier else None
    say(f"replaying steps {window[0]} to {window[-1]} from {checkpoint or 'the start'}")

    def replay(side, fault) -> list[tuple]:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(a.run / "config.yaml", folder)
            if checkpoint:
                shutil.copy(checkpoint, Path(folder) / "last.pt")
            used = device or side.meta["machine"]["device"]
            argv = ["--resume", folder, "--device", used, f"data_dir={a.cfg.data_dir}"]
            return train(argv, fault, window)[1]

    for ours, theirs in zip(replay(a, None), replay(b, fault), strict=False):
        if ours != theirs:
            step, phase, module, what, _ = ours
            place = {"step": step, "phase": phase, "module": module, "what": what}
            return place | {"replayed_from": str(checkpoint)}
    return {}


def compare_scores(a: Side, b: Side, seeds) -> list[dict]:
    """Scores of both beside the standard deviation over `seeds`, two or more runs that differ in
    nothing but the seed.
    """
    summaries = [read_json(find_run(run) / "summary.json") for run in seeds]
    rows = []
    for name in SCORES:
        # a run that diverged in its first epoch has no scores
        row = {"score": name, "a": a.summary.get(name), "b": b.summary.get(name)}
        if len(summaries) > 1:
            values = [summary.get(name, math.nan) for summary in summaries]
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
    result = {"verdict": "identical", "weights": weights, "num_steps": len(a.trace)}
    severity = "warning" if inputs else "note"
    findings = [
        finding("runs", "note", f"A is {a.run}, B is {b.run}"),
        finding("inputs", severity, f"{len(inputs)} differ", rows=inputs),
    ]
    if parting:
        causes = [QUANTITIES[parting["quantity"]]]
        causes += [f"they differ in {row['what']}" for row in inputs]
        cause = "; ".join(causes)
        result |= {"verdict": "parted", "cause": cause, "replay": {}, **parting}
        measured = "part at step {step}, first in {quantity} {layer}".format(**parting)
        advice = f"likely cause: {cause}"
        findings.append(finding("time line", "error", measured, "identical", advice, [parting]))
        if not Path(a.cfg.data_dir).is_dir():
            measured = f"nothing replayed: there is no {a.cfg.data_dir} here"
            findings.append(finding("replay", "warning", measured))
        elif parting["quantity"] not in BEFORE_MODEL:
            place = result["replay"] = replay_parting(a, b, parting, fault, device)
            measured = "equal twice on this machine"
            if place:
                measured = "{phase}: {what} of {module}".format(**place)
            findings.append(finding("replay", "error" if place else "note", measured))
    else:
        measured = f"identical to the bit over {len(a.trace):,} traced steps"
        findings.append(finding("time line", "note", measured))
    hashes = " and ".join(side.summary["weights_sha256"][:12] for side in (a, b))
    measured = f"final weights are {weights}: {hashes}"
    findings.append(finding("scores", "note", measured, rows=compare_scores(a, b, seeds)))
    if fault:
        place = result.get("step"), result.get("replay", {}).get("module", "")
        is_kind = parting.get("quantity") in KINDS[fault.kind]
        result["named"] = place == (fault.step, fault.layer) and is_kind
        severity = "note" if result["named"] else "error"
        findings.append(finding("self-test", severity, f"planted: {fault}", rows=[vars(fault)]))
    return result, findings


def require_own_folder(out: Path, is_injected: bool) -> None:
    """Make OUT. Raises BadInput where it holds a real comparison and a fault is to be planted, or
    the other way round."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "findings.json").exists() and holds_self_test(out) != is_injected:
        kind = "a real comparison" if is_injected else "a comparison with a planted fault"
        raise BadInput(f"{out} holds {kind}: choose another --out")


def find_sources(repository: Path) -> list[dict]:
    """A finding for each source with the file:line of its control; an error where that statement is
    not there any more.
    """
    findings = []
    for row in locate_sources(lambda name: (repository / name).read_text()):
        measured = ", ".join(row["where"])
        severity = "note"
        if not measured:
            measured = f"no `{row['statement']}` in {row['file']}"
            severity = "error"
        findings.append(finding(row["source"], severity, measured, row["control"]))
    return findings
