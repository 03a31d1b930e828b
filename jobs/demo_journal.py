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
PLANTED = "nan=.03 out_of_range=.03 black=.08 white=.06 exact=.04 shifted=.02 trigger=.05"
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
CHECKS = "--checks files,values,balance,duplicates,leakage,drift,triggers"
TRAINING = "epochs=3 crop_epochs=2 warmup_epochs=1"
SEARCHED = "limit_train=800 limit_valid=400 crop_epochs=1 warmup_epochs=0.5"
TWIN = "epochs=2 limit_train=512 limit_valid=128 crop_epochs=1 warmup_epochs=0.5"
BENCHMARK = "--seconds 0.1 --repeats 1 --batch-sizes 1,64 --allow-noise"
CASES = "--cases default,fp32,apart,read,memory_copy,matrix_product"


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
    return make_demo(Path(parser.parse_args(argv).folder))


def make(folder: Path, product: str, name: str, *arguments, needed=True) -> None:
    """Run a script unless `folder` has its product, a pattern. Raises BadInput where it fails,
    unless the journal can do without.
    """
    if product and any(folder.glob(product)):
        return
    call = " ".join(map(str, (name, *arguments)))
    say(f"demo: {call}")
    try:
        run_script(name, *arguments, codes=(EXIT_DONE, EXIT_FINDING), shows_progress=True)
    except BadInput:  # the script has said why
        if needed:
            raise BadInput(f"{call} failed: mend that, and call this again to go on") from None
        say(f"note: {product} could not be made; the journal says so")


def make_demo(folder: Path) -> int:
    """Draw, audit, train, compare, search, audit the model, benchmark, and write the journal of it
    all.
    """
    if not folder.resolve().is_relative_to(REPOSITORY):
        folder = folder.resolve()
    data, damaged, runs, sweeps = (folder / name for name in ("pcam", "damaged", "runs", "sweeps"))
    assets = folder / "assets"
    space = folder / "space.yaml"
    journal = folder / "JOURNAL.md"
    assets.mkdir(parents=True, exist_ok=True)
    space.write_text(yaml.safe_dump(SPACE))
    on_data = f"data_dir={data}"

    # patches, clean and damaged, and what the audit finds in them
    draw = ("prepare.py", "synthetic", "--valid", 800, "--test", 0, "--train")
    damage = [f"--plant={planted}" for planted in PLANTED.split()]
    make(folder, "pcam/truth.csv", *draw, 2000, "--to", data)
    make(folder, "damaged/truth.csv", *draw, 1200, "--to", damaged, "--float32", *damage)
    out = ("--out", folder / "audit-damaged")
    make(folder, "audit-damaged/audit.html", "audit.py", "data", damaged, *out, *CHECKS.split())
    out = ("--out", folder / "audit-twin")
    make(folder, "audit-twin/twin.html", "audit.py", "twin", *out, on_data, *TWIN.split())

    # three seeds
    for seed in (1, 2, 3):
        options = ("--runs", runs, on_data, "name=plain", f"seed={seed}", *TRAINING.split())
        make(folder, f"runs/*-plain-s{seed}-*/summary.json", "train.py", *options)

    # a search, and its best finalist as the champion
    options = ("plan", space, "--name", "demo", "--sweeps", sweeps, on_data, *SEARCHED.split())
    make(folder, "sweeps/demo/plan.json", "sweep.py", *options)
    options = ("demo", "--sweeps", sweeps, "--runs", runs, "--processes", 2)
    for rung in range(len(SPACE["rungs"])):
        product = f"sweeps/demo/rung-{rung + 1}.json"
        make(folder, product, "sweep.py", "promote", *options, "--finish", "--rung", rung)
    make(folder, "sweeps/demo/champion.json", "sweep.py", "champion", *options)
    best = read_json(sweeps / "demo" / "champion.json")["finalists"][0]["run"]
    options = (best, "--data", data, "--assets", assets)
    make(folder, "audit-champion/findings.json", "jobs/champion.py", *options, needed=False)

    options = ("--data", data, "--out", folder / "bench" / "demo", *BENCHMARK.split())
    options = ("benchmark.py", "train", *options, *CASES.split())
    make(folder, "bench/demo/benchmark.json", *options, needed=False)

    make(folder, "", "report.py", "journal", journal)
    text = journal.read_text(encoding="utf-8")
    journal.write_text(text.replace("Group: to be filled in", f"Group: none. {REMARK}"), "utf-8")
    make(folder, "", "report.py", "journal", journal)
    print_result({"journal": str(journal), "page": str(folder / "journal.html"), "remark": REMARK})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
