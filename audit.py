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
    REPOSITORY,
    BadInput,
    Parser,
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
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in allowed:
                words = f"{name!r} is unknown; allowed: {', '.join(allowed)}"
                raise argparse.ArgumentTypeError(words)
        return names

    return parse_names


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="audit.py",
        usage="python audit.py data data/mine [options]",
        description="Findings with evidence: findings.json, a table and a page.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, prog="audit.py")

    def add_verb(audit, name: str, text: str):
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(audit=audit)
        verb.add_argument(
            "--out", type=place, metavar="OUT", help="a folder (default: audit-..., after DIR)"
        )
        return verb, verb.add_argument

    verb, add = add_verb(
        audit_data,
        "data",
        "what is in these files, and can they be trusted: findings, quarantine.csv and a page",
    )
    add("dir", type=place, metavar="DIR", help="a PCam folder; key=value: a config, for the folds")
    add(
        "--checks",
        type=names_of(CHECKS),
        default=(),
        metavar="LIST",
        help=f"some of {','.join(CHECKS)} (default: all but groups)",
    )
    add(
        "--plant",
        action="store_true",
        help="measure the power of the checks on a copy with planted damage",
    )
    add(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="judge the labels of train by these runs of its folds (make folds trains them)",
    )
    add(
        "--train-folds",
        action="store_true",
        help="train such folds here first: an hour on two cores, more for full size",
    )
    verb.add_device()

    _, add = add_verb(
        audit_twin,
        "twin",
        "are two runs of one configuration identical to the bit, and if not, where they part",
    )
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="two runs, one, or none; key=value: the config of those that are made",
    )
    add(
        "--inject",
        metavar="F",
        help="self-test: plant output:LAYER@STEP, gradient:, draw: or sample@STEP in B",
    )
    add(
        "--seeds",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs of other seeds, for their deviation",
    )
    add(
        "--sources",
        action="store_true",
        help="list the sources of non-determinism and what controls them",
    )
    add("--device", metavar="D", help="auto, cpu, cuda or cuda:N (default: that of the runs)")

    verb, add = add_verb(
        audit_model,
        "model",
        "where a model fails: slices, the price of thresholds, a shortcut, its worst errors",
    )
    add(
        "dir",
        type=place,
        metavar="DIR",
        help="a PCam folder; key=value: a config's keys that do not change the weights",
    )
    add(
        "--ckpt",
        required=True,
        metavar="RUN|FILE",
        help="a run folder (its best.pt is taken) or a checkpoint",
    )
    splits = ("train", "valid", "test")
    add("--split", choices=splits, default="valid", help="(default: valid)")
    add(
        "--parts",
        type=names_of(MODEL_PARTS),
        default=MODEL_PARTS,
        metavar="LIST",
        help=f"some of {','.join(MODEL_PARTS)} (default: all)",
    )
    add(
        "--limit",
        type=positive,
        default=0,
        metavar="N",
        help="audit N patches, evenly spaced (default: all)",
    )
    add(
        "--store", action="store_true", help="first calibrate the checkpoint anew, in place, on DIR"
    )
    add(
        "--without-patches",
        action="store_true",
        help="no picture of a patch on the page: maps and captions",
    )
    verb.add_device()

    _, add = add_verb(
        audit_handover,
        "handover",
        "a handover folder, or a repository's submission checklist, item by item",
    )
    add("folder", metavar="DIR", help="what report.py handover wrote, or a repository such as .")
    return parser.parse_with_overrides(argv)


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
    out = Path(args.out or f"{kind}-{Path(args.dir).resolve().name}")
    folds = args.overrides, args.device, args.plant, args.runs, args.train_folds
    return finish(out, data.audit_data(args.dir, out, checks, *folds))


def finish(out: Path, result: dict) -> int:
    """Print the result of an audit and give its exit code."""
    print_result({"out": str(out), **result})
    objections = result["num_errors"], result["num_warnings"], result.get("not_run")
    return EXIT_FINDING if any(objections) else EXIT_DONE


def audit_twin(args) -> int:
    """Identical: 0; they part: 1. With --inject: 0 if the localiser names what was planted. With
    --sources: 0 if every source of non-determinism has its control.
    """
    from lib.audit import replay, twin
    from lib.audit.twin_page import write_twin_page
    from lib.config import parse_overrides
    from lib.files import write_json

    if args.sources:
        findings = twin.find_sources(REPOSITORY)
        num_missing = sum(finding["severity"] == "error" for finding in findings)
        print_result({"num_sources": len(findings), "num_missing": num_missing})
        return EXIT_FINDING if num_missing else EXIT_DONE

    runs, overrides = args.runs, parse_overrides(args.overrides)
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
        say(f"training twin {'AB'[len(sides)]}")
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
        model.recalibrate(args.ckpt, args.dir, args.overrides, args.device)
    subject = args.ckpt, args.dir, args.split, out, args.overrides, args.device
    result = model.audit_model(*subject, not args.without_patches, args.parts, args.limit)
    say(f"{result['num_warnings']} warnings; page {result['page']}")
    return finish(out, result)


def audit_handover(args) -> int:
    """Everything there: 0; an item is missing: 1. A handover folder is checked with the copy of the
    repository in it.
    """
    from lib.audit.checklist import audit_checklist, audit_folder
    from lib.files import write_json

    folder, out = Path(args.folder), Path(args.out or "audit-handover")
    if (folder / "inference.py").is_file():
        findings = audit_checklist(folder)
    elif (folder / "verify.py").is_file():
        findings = audit_folder(folder)
        # no code of a damaged folder is run
        if all(finding["severity"] != "error" for finding in findings):
            findings += audit_checklist(folder / "code")
    else:
        raise BadInput(f"{folder} is neither a handover folder nor a repository of this program")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "findings.json"
    write_json(path, findings)
    missing = [finding["check"] for finding in findings if finding["severity"] == "error"]
    print_result({"num_items": len(findings), "missing": missing, "findings": str(path)})
    return EXIT_FINDING if missing else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
