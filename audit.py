"""Audits: findings with evidence.

python audit.py data DIR [--out OUT] [--checks files,values,...] [--plant] [key=value ...]
python audit.py twin [A [B]] [--out OUT] [--inject KIND:LAYER@STEP] [--seeds RUN ...]
                     [key=value ...]
python audit.py twin --sources
python audit.py model --ckpt RUN|FILE DIR [--split valid] [--out OUT] [--parts LIST] [--limit N]
                      [--store] [--without-patches]
python audit.py handover DIR [--out OUT]
"""

import argparse
import sys
from pathlib import Path

from lib.audit import MODEL_PARTS
from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    BadInput,
    Parser,
    nearest,
    place,
    positive,
    print_result,
    say,
    script,
)

USUAL = (
    *("files", "values", "unusual", "balance", "duplicates"),
    *("leakage", "drift", "triggers", "labels"),
)
CHECKS = ("groups", *USUAL)  # groups are written into DIR, over those that are there: on request


def names_of(allowed):
    """The type of an argument that lists some of the `allowed` names, with commas between."""

    def parse_names(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in allowed:
                hint = nearest(name, allowed)
                words = f"{name!r} is unknown{hint}; allowed: {', '.join(allowed)}"
                raise argparse.ArgumentTypeError(words)
        return names

    return parse_names


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="audit.py", description="Findings with evidence: findings.json, a table and a page."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="data|twin|model|handover")

    def add_verb(audit, name: str, text: str, out: str) -> Parser:
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(audit=audit)
        text = f"for all that is written (default: {out})"
        verb.add_argument("--out", type=place, metavar="OUT", help=text)
        return verb

    data = add_verb(
        audit_data,
        "data",
        "what is in these files, and can they be trusted: findings, quarantine.csv and a page",
        "audit-NAME of DIR, with --checks audit-part-NAME",
    )
    data.add_argument(
        "--checks",
        type=names_of(CHECKS),
        default=(),
        metavar="LIST",
        help=f"some of {','.join(CHECKS)} (default: all but groups)",
    )
    data.add_argument(
        "--plant",
        action="store_true",
        help="measure the power of the checks on a copy with planted damage",
    )
    data.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="judge the labels of train by these runs of its folds (make folds trains them)",
    )
    data.add_argument(
        "--train-folds",
        action="store_true",
        help="train such folds here first: an hour on two cores, more for full size",
    )
    twin = add_verb(
        audit_twin,
        "twin",
        "are two runs of one configuration identical to the bit, and if not, where they part",
        "audit-twin, with --inject audit-twin-injected",
    )
    twin.add_argument(
        "--inject",
        metavar="F",
        help="self-test: plant output:LAYER@STEP, gradient:, draw: or sample@STEP in B",
    )
    twin.add_argument(
        "--seeds",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs of other seeds, for their deviation",
    )
    twin.add_argument(
        "--sources",
        action="store_true",
        help="list the sources of non-determinism and what controls them",
    )
    twin.add_argument("items", nargs="*", metavar="A B | key=value", help="two runs, one, or none")
    model = add_verb(
        audit_model,
        "model",
        "where a model fails: slices, the price of thresholds, a shortcut, its worst errors",
        "audit-model-NAME of DIR",
    )
    model.add_argument(
        "--ckpt",
        required=True,
        metavar="RUN|FILE",
        help="a run folder (its best.pt is taken) or a checkpoint",
    )
    model.add_argument(
        "--split",
        choices=("train", "valid", "test"),
        default="valid",
        help="(default: valid)",
    )
    model.add_argument(
        "--parts",
        type=names_of(MODEL_PARTS),
        default=(),
        metavar="LIST",
        help=f"some of {','.join(MODEL_PARTS)} (default: all)",
    )
    model.add_argument(
        "--limit",
        type=positive,
        default=0,
        metavar="N",
        help="audit N patches, evenly spaced (default: all)",
    )
    model.add_argument(
        "--store", action="store_true", help="first calibrate the checkpoint anew, in place, on DIR"
    )
    model.add_argument(
        "--without-patches",
        action="store_true",
        help="no picture of a patch on the page: maps and captions",
    )
    for verb, keys in ((data, "for the folds"), (model, "that do not change the weights")):
        verb.add_argument("dir", type=place, metavar="DIR", help="a PCam folder")
        verb.add_argument("items", nargs="*", metavar="key=value", help=f"keys of a config {keys}")
    for verb, device in ((data, "auto"), (twin, None), (model, "auto")):
        text = "auto, cpu, cuda or cuda:N (default: auto)"
        verb.add_argument("--device", default=device, metavar="D", help=text)
    handover = add_verb(
        audit_handover,
        "handover",
        "a handover folder, or a repository's submission checklist, item by item",
        "audit-handover, of a handover folder audit-handover-NAME",
    )
    handover.add_argument(
        "folder", metavar="DIR", help="what report.py handover wrote, or a repository such as ."
    )
    args, rest = parser.parse_known_args(argv)  # which leaves key=value behind options to us
    items = getattr(args, "items", None)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item or items is None]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if items is not None:
        items += rest
    return args


@script
def main(argv=None) -> int:
    args = parse(argv)
    return args.audit(args)


def audit_data(args) -> int:
    """Nothing to object to: 0; a warning, an error, or a check that could not run: 1."""
    from lib.audit.data import run as data

    checks = [name for name in CHECKS if name in (args.checks or USUAL)]
    # a new audit clears its OUT: some checks alone leave the findings of a whole audit in place
    kind = "audit-part" if args.checks else "audit"
    if checks == ["groups"]:
        kind = "audit-groups"
    out = Path(args.out or f"{kind}-{Path(args.dir).resolve().name}")
    folds = args.items, args.device, args.plant, args.runs, args.train_folds
    result = data.audit_data(args.dir, out, checks, *folds)
    return finish(out, result)


def finish(out: Path, result: dict) -> int:
    """Print the result of an audit and give its exit code."""
    print_result({"out": str(out), **result})
    objections = result["num_errors"], result["num_warnings"], result.get("not_run")
    return EXIT_FINDING if any(objections) else EXIT_DONE


def list_sources() -> int:
    """Every source has its control: 0; one has lost it: 1."""
    from lib.audit.twin import find_sources
    from lib.rundir import REPOSITORY

    findings = find_sources(REPOSITORY)
    num_missing = sum(finding["severity"] == "error" for finding in findings)
    print_result({"num_sources": len(findings), "num_missing": num_missing})
    return EXIT_FINDING if num_missing else EXIT_DONE


def audit_twin(args) -> int:
    """Identical: 0; they part: 1. With --inject: 0 if the localiser names what was planted."""
    if args.sources:
        return list_sources()
    from lib.audit import replay, twin
    from lib.audit.twin_page import write_twin_page
    from lib.config import parse_overrides
    from lib.files import write_json

    runs = [item for item in args.items if "=" not in item or Path(item).is_dir()]
    overrides = parse_overrides(item for item in args.items if item not in runs)
    if len(runs) > 2 or (runs and overrides) or (args.inject and len(runs) == 2):
        raise BadInput(
            "twin takes two run folders, or one to repeat, or key=value; --inject needs a run that"
            " is made here"
        )

    # read the runs that are given, make those that are not
    out = Path(args.out or ("audit-twin-injected" if args.inject else "audit-twin"))
    twin.require_own_folder(out, is_injected=bool(args.inject))
    sides = [twin.read_side(run) for run in runs]
    fault = None
    argv = ["--runs", str(out / "runs"), "--trace", "--device", args.device or "auto"]
    if runs:
        argv += ["--config", str(sides[0].run / "config.yaml"), f"data_dir={sides[0].cfg.data_dir}"]
    else:
        argv += [f"{key}={value}" for key, value in (twin.SHORT | overrides).items()]
    while len(sides) < 2:
        if sides and args.inject:
            fault = replay.parse_fault(args.inject, sides[0].cfg, sides[0].summary["num_steps"])
        say(f"training twin {'AB'[len(sides)]}" + (f" with {fault}" if fault else ""))
        sides.append(twin.read_side(twin.make_run(argv, fault)))

    # compare them
    result, findings = twin.compare(*sides, fault, args.device, args.seeds)
    page = write_twin_page(out / "twin.html", findings, *sides)
    write_json(out / "findings.json", findings)
    folders = {name: str(side.run) for name, side in zip("ab", sides, strict=True)}
    print_result(result | folders | {"page": str(page)})
    is_fine = result["named"] if fault else result["verdict"] == "identical"
    return EXIT_DONE if is_fine else EXIT_FINDING


def audit_model(args) -> int:
    """Nothing to object to: 0; a warning or an error: 1."""
    from lib.audit import model

    out = Path(args.out or f"audit-model-{Path(args.dir).resolve().name}")
    if args.store:
        model.recalibrate(args.ckpt, args.dir, args.items, args.device)
    subject = args.ckpt, args.dir, args.split, out, args.items, args.device
    result = model.audit_model(
        *subject, not args.without_patches, args.parts or MODEL_PARTS, args.limit
    )
    say(f"{result['num_warnings']} warnings; page {result['page']}")
    return finish(out, result)


def audit_handover(args) -> int:
    """Everything there: 0; an item is missing: 1. A handover folder is checked with the copy of the
    repository in it.
    """
    from lib.audit.checklist import audit_checklist, audit_folder
    from lib.files import write_json

    folder = Path(args.folder)
    out = args.out or "audit-handover"
    if (folder / "inference.py").is_file():
        findings = audit_checklist(folder)
    elif (folder / "verify.py").is_file():
        out = args.out or f"audit-handover-{folder.resolve().name}"
        findings = audit_folder(folder)
        # no code of a damaged folder is run
        if all(finding["severity"] != "error" for finding in findings):
            findings += audit_checklist(folder / "code")
    else:
        raise BadInput(f"{folder} is neither a handover folder nor a repository of this program")
    path = Path(out, "findings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, findings)
    missing = [finding["check"] for finding in findings if finding["severity"] == "error"]
    print_result({"num_items": len(findings), "missing": missing, "findings": str(path)})
    return EXIT_FINDING if missing else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
