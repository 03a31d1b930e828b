"""What `make demo-journal` does: every step that the journal asks for, on synthetic slides and in
small, each skipped once its result is there. Nothing of it says anything about real tissue."""

import sys
from pathlib import Path

import yaml

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
    REPOSITORY,
    BadInput,
    Parser,
    place,
    print_result,
    run_script,
    say,
    script,
)
from lib.files import read_json

REMARK = "Synthetic patches, drawn by prepare.py: the scores say nothing about real tissue."
PLANTED = {
    "nan": 0.03,
    "out_of_range": 0.03,
    "black": 0.08,
    "white": 0.06,
    "exact": 0.04,
    "shifted": 0.02,
    "trigger": 0.05,
}
SPACE = {
    "design": "sobol",
    "trials": 6,
    "seed": 1,
    "seeds": [1],
    "rungs": [1, 2],
    "champion_seeds": 3,
    "ranges": {
        "lr": {"log": [0.002, 0.05]},
        "batch_size": {"choice": [32, 64]},
        "weight_decay": {"range": [0.0, 0.1]},
    },
}
CHECKS = "files,values,balance,duplicates,leakage,drift,triggers"
CASES = "default,fp32,apart,read,memory_copy,matrix_product"
QUICK = (
    "--seconds",
    0.1,
    "--repeats",
    1,
    "--batch-sizes",
    "1,64",
    "--allow-noise",
    "--cases",
    CASES,
)
# how much is drawn and learnt: a test asks for less
SIZES = {"train": 2000, "valid": 800, "damaged": 1200}
TRAINING = ["epochs=3", "crop_epochs=2", "warmup_epochs=1"]
SEARCHED = ["limit_train=800", "limit_valid=400", "crop_epochs=1", "warmup_epochs=0.5"]
TWIN = ["epochs=2", "limit_train=512", "limit_valid=128", "crop_epochs=1", "warmup_epochs=0.5"]


@script
def main(argv=None) -> int:
    parser = Parser(
        prog="demo_journal.py", description="A journal from synthetic slides, from nothing."
    )
    parser.add_argument(
        "folder",
        type=place,
        metavar="DIR",
        help="for data, runs, audits and the journal; what is there is kept",
    )
    return make_demo(Path(parser.parse_args(argv).folder), SIZES, TRAINING, SEARCHED, TWIN)


def make(product, name: str, *arguments, codes=(EXIT_DONE,), needed=True) -> None:
    """Run a script unless its product is there. Raises BadInput where it fails, unless the journal
    can do without.
    """
    if product and product.exists():
        return
    call = " ".join(map(str, (name, *arguments)))
    say(f"demo: {call}")
    try:
        run_script(name, *arguments, codes=codes, shows_progress=True)
    except BadInput:  # the script has said why
        if needed:
            raise BadInput(f"{call} failed: mend that, and call this again to go on") from None
        say(f"note: {product} could not be made; the journal says so")


def make_demo(
    folder: Path, sizes: dict, training: list[str], searched: list[str], twin: list[str]
) -> int:
    """Draw, audit, train, compare, search, audit the model, benchmark, and write the journal of it
    all.
    """
    if not folder.resolve().is_relative_to(REPOSITORY):
        folder = folder.resolve()
    data, damaged, runs, assets = (folder / name for name in ("pcam", "damaged", "runs", "assets"))
    assets.mkdir(parents=True, exist_ok=True)
    found = EXIT_DONE, EXIT_FINDING

    # patches, clean and damaged, and what the audit finds in them
    draw = ("prepare.py", "synthetic", "--valid", sizes["valid"], "--test", 0)
    damage = ["--float32", *(f"--plant={kind}={rate}" for kind, rate in PLANTED.items())]
    make(data / "truth.csv", *draw, "--to", data, "--train", sizes["train"])
    make(damaged / "truth.csv", *draw, "--to", damaged, "--train", sizes["damaged"], *damage)
    audit, pair = folder / "audit-damaged", folder / "audit-twin"
    options = ("data", damaged, "--out", audit, "--checks", CHECKS)
    make(audit / "audit.html", "audit.py", *options, codes=found)
    options = ("twin", "--out", pair, f"data_dir={data}", "name=twin", *twin)
    make(pair / "twin.html", "audit.py", *options, codes=found)

    # three seeds
    for seed in (1, 2, 3):
        begun = sorted(runs.glob(f"*-plain-s{seed}-*/config.yaml"))
        if begun:
            run = begun[-1].parent
            make(run / "summary.json", "train.py", "--resume", run)
        else:
            options = (f"data_dir={data}", "name=plain", f"seed={seed}", *training)
            make(None, "train.py", "--runs", runs, *options)

    # a search, and its best finalist as the champion
    sweeps, search = folder / "sweeps", folder / "sweeps" / "demo"
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    options = ("--name", "demo", "--sweeps", sweeps, f"data_dir={data}", *searched)
    make(search / "plan.json", "sweep.py", "plan", folder / "space.yaml", *options)
    where = ("demo", "--sweeps", sweeps, "--runs", runs, "--processes", 2, "--finish")
    for rung in range(len(SPACE["rungs"])):
        path = search / f"rung-{rung + 1}.json"
        make(path, "sweep.py", "promote", *where, "--rung", rung)
    make(search / "champion.json", "sweep.py", "champion", *where, codes=found)
    best = Path(read_json(search / "champion.json")["finalists"][0]["run"])
    options = (best, "--data", data, "--assets", assets)
    make(folder / "audit-champion" / "findings.json", "jobs/champion.py", *options, needed=False)

    bench = folder / "bench" / "demo"
    options = ("train", "--data", data, "--out", bench, *QUICK)
    make(bench / "benchmark.json", "benchmark.py", *options, codes=found, needed=False)

    journal = folder / "JOURNAL.md"
    make(None, "report.py", "journal", journal, codes=found)
    text = journal.read_text(encoding="utf-8")
    journal.write_text(text.replace("Group: to be filled in", f"Group: none. {REMARK}"), "utf-8")
    make(None, "report.py", "journal", journal, codes=found)
    print_result({"journal": str(journal), "page": str(folder / "journal.html"), "remark": REMARK})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
