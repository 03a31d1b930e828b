"""Audits: findings with evidence.

python audit.py data DIR --out OUT [--checks files,values,...] [--plant] [key=value ...]
python audit.py twin [A [B]] [--out OUT] [--inject KIND:LAYER@STEP] [--seeds RUN ...]
                     [key=value ...]
python audit.py twin --sources
python audit.py model --ckpt RUN|FILE DIR [--split valid] --out OUT [--parts LIST] [--limit N]
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


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="audit.py", description="Findings with evidence: findings.json, a table and a page."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="data|twin|model|handover")
    data = verbs.add_parser(
        "data",
        help="what is in these files, and can they be trusted: findings, quarantine.csv and a page",
    )
    data.add_argument("dir", type=place, metavar="DIR", help="a PCam folder")
    data.add_argument(
        "--out",
        type=place,
        metavar="OUT",
        help="for all that is written (default: audit-NAME of DIR, with --checks audit-part-NAME)",
    )
    data.add_argument(
        "--checks",
        default="",
        metavar="LIST",
        help=f"some of {','.join(CHECKS)} (default: all but groups)",
    )
    data.add_argument(
        "--plant",
        action="store_true",
        help="measure the power of the checks on a copy with planted damage",
    )
    data.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="for the folds of the check of labels (default: auto)",
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
    data.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for the folds, e.g. num_folds=5 epochs=10",
    )
    data.set_defaults(audit=audit_data, sources=False)
    twin = verbs.add_parser(
        "twin",
        help="are two runs of one configuration identical to the bit, and if not, where they part",
    )
    twin.add_argument(
        "runs",
        nargs="*",
        metavar="A B | key=value",
        help="two run folders; one, to be repeated here; or none",
    )
    twin.add_argument(
        "--out",
        metavar="OUT",
        help="for runs, findings, page (default: audit-twin, with --inject audit-twin-injected)",
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
    twin.add_argument(
        "--device",
        metavar="D",
        help="auto, cpu, cuda or cuda:N (default: auto, and a run's own in its replay)",
    )
    twin.set_defaults(audit=audit_twin)
    model = verbs.add_parser(
        "model",
        help="where a model fails: slices, the price of thresholds, shortcuts, its worst errors",
    )
    model.add_argument("dir", type=place, metavar="DIR", help="a PCam folder with labels")
    model.add_argument(
        "--ckpt",
        required=True,
        metavar="RUN|FILE",
        help="a run folder (its best.pt is taken) or a checkpoint",
    )
    model.add_argument("--split", default="valid", help="train, valid or test (default: valid)")
    model.add_argument(
        "--out",
        type=place,
        metavar="OUT",
        help="for all that is written (default: audit-model-NAME of DIR)",
    )
    model.add_argument(
        "--parts",
        default="",
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
    model.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    model.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="that do not change the weights, such as views=1",
    )
    model.set_defaults(audit=audit_model, sources=False)
    handover = verbs.add_parser(
        "handover", help="a handover folder, or a repository's submission checklist, item by item"
    )
    handover.add_argument(
        "folder", metavar="DIR", help="what report.py handover wrote, or a repository such as ."
    )
    handover.add_argument(
        "--out",
        default="audit-handover",
        metavar="OUT",
        help="for findings.json (default: audit-handover)",
    )
    handover.set_defaults(audit=audit_handover, sources=False)
    args, rest = parser.parse_known_args(argv)  # which leaves key=value behind options to us
    if unknown := [
        item for item in rest if item.startswith("-") or "=" not in item or args.verb == "handover"
    ]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.verb != "handover":
        (args.runs if args.verb == "twin" else args.overrides).extend(rest)
    return args


@script
def main(argv=None) -> int:
    args = parse(argv)
    return list_sources() if args.sources else args.audit(args)


def audit_data(args) -> int:
    """Nothing to object to: 0; a warning, an error, or a check that could not run: 1."""
    from lib.audit.data import run as data

    wanted = [name.strip() for name in args.checks.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in CHECKS]:
        raise BadInput(
            f"--checks: {unknown[0]!r} is unknown{nearest(unknown[0], CHECKS)}; allowed:"
            f" {', '.join(CHECKS)}"
        )
    checks = [name for name in CHECKS if name in (wanted or USUAL)]
    # a new audit clears its OUT: some checks alone leave the findings of a whole audit in place
    kind = "audit"
    if wanted:
        kind = "audit-groups" if checks == ["groups"] else "audit-part"
    out = Path(args.out or f"{kind}-{Path(args.dir).resolve().name}")
    result = data.audit_data(
        args.dir,
        out,
        checks,
        args.overrides,
        args.device,
        args.plant,
        args.runs,
        args.train_folds,
    )
    print_result({"out": str(out), **result})
    return (
        EXIT_FINDING
        if result["num_errors"] or result["num_warnings"] or result["not_run"]
        else EXIT_DONE
    )


def list_sources() -> int:
    """Every source has its control: 0; one has lost it: 1."""
    from lib.audit.twin import find_sources
    from lib.rundir import REPOSITORY

    findings = find_sources(REPOSITORY)
    num_missing = sum(found["severity"] == "error" for found in findings)
    print_result({"num_sources": len(findings), "num_missing": num_missing})
    return EXIT_FINDING if num_missing else EXIT_DONE


def audit_twin(args) -> int:
    """Identical: 0; they part: 1. With --inject: 0 if the localiser names what was planted."""
    from lib.audit import replay, twin
    from lib.audit.twin_page import write_twin_page
    from lib.config import parse_overrides
    from lib.files import write_json
    from lib.trace import QUANTITIES

    runs = [item for item in args.runs if "=" not in item or Path(item).is_dir()]
    overrides = parse_overrides(item for item in args.runs if item not in runs)
    if len(runs) > 2 or (runs and overrides) or (args.inject and len(runs) == 2):
        raise BadInput(
            "twin takes two run folders, or one to repeat, or key=value; --inject needs a run that"
            " is made here"
        )

    # read the runs that are given, make those that are not
    out = Path(args.out or ("audit-twin-injected" if args.inject else "audit-twin"))
    twin.require_own_folder(out, is_injected=bool(args.inject))
    sides, fault = [twin.read_side(run) for run in runs], None
    argv = ["--runs", str(out / "runs"), "--trace", "--device", args.device or "auto"]
    argv += (
        ["--config", str(sides[0].run / "config.yaml"), f"data_dir={sides[0].cfg.data_dir}"]
        if runs
        else []
    )
    argv += (
        [f"{key}={value}" for key, value in (twin.SHORT | overrides).items()] if not runs else []
    )
    while len(sides) < 2:
        if sides and args.inject:
            fault = replay.parse_fault(args.inject, sides[0].cfg, sides[0].summary["num_steps"])
        say(f"training twin {'AB'[len(sides)]}" + (f" with {fault}" if fault else ""))
        sides.append(twin.read_side(twin.make_run(argv, fault)))

    # compare them
    a, b = sides
    result, findings = twin.compare(a, b, fault, args.device, args.seeds)
    equal = {
        name: [a.trace[step][name] == b.trace[step][name] for step in a.trace]
        for name in QUANTITIES
    }
    page = write_twin_page(out / "twin.html", findings, equal, [*a.trace], a.run, b.run)
    write_json(out / "findings.json", findings)
    print_result(result | {"a": str(a.run), "b": str(b.run), "page": str(page)})
    return (
        EXIT_FINDING
        if (not result["named"] if fault else result["verdict"] == "parted")
        else EXIT_DONE
    )


def audit_model(args) -> int:
    """Nothing to object to: 0; a warning or an error: 1."""
    from lib.audit import model
    from lib.pcam import SPLITS

    if args.split not in SPLITS:
        raise BadInput(
            f"--split {args.split!r} is unknown{nearest(args.split, SPLITS)}; allowed:"
            f" {', '.join(SPLITS)}"
        )
    parts = [name.strip() for name in args.parts.split(",") if name.strip()] or MODEL_PARTS
    for name in parts:
        if name not in MODEL_PARTS:
            hint = nearest(name, MODEL_PARTS)
            allowed = ", ".join(MODEL_PARTS)
            raise BadInput(f"--parts: {name!r} is unknown{hint}; allowed: {allowed}")
    out = Path(args.out or f"audit-model-{Path(args.dir).resolve().name}")
    if args.store:
        model.recalibrate(args.ckpt, args.dir, args.overrides, args.device)
    result = model.audit_model(
        args.ckpt,
        args.dir,
        args.split,
        out,
        args.overrides,
        args.device,
        with_patches=not args.without_patches,
        parts=parts,
        limit=args.limit,
    )
    say(f"{result['num_warnings']} warnings; page {result['page']}")
    print_result({"out": str(out), **result})
    return EXIT_FINDING if result["num_errors"] or result["num_warnings"] else EXIT_DONE


def audit_handover(args) -> int:
    """Everything there: 0; an item is missing: 1. A handover folder is checked with the copy of the
    repository in it.
    """
    from lib.audit.checklist import audit_checklist, audit_folder
    from lib.files import write_json

    folder, out = Path(args.folder), Path(args.out)
    code = folder if (folder / "inference.py").is_file() else folder / "code"
    if not folder.is_dir() or (code == folder / "code" and not (folder / "verify.py").is_file()):
        raise BadInput(f"{folder} is neither a handover folder nor a repository of this program")
    findings = [] if code == folder else audit_folder(folder)
    # no code of a damaged folder is run
    is_whole = all(found["severity"] != "error" for found in findings)
    findings += audit_checklist(code) if is_whole else []
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "findings.json", findings)
    missing = [found["check"] for found in findings if found["severity"] == "error"]
    print_result(
        {"num_items": len(findings), "missing": missing, "findings": str(out / "findings.json")}
    )
    return EXIT_FINDING if missing else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
