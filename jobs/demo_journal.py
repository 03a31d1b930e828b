"""What `make demo-journal` does: every step that the journal asks for, on synthetic slides and in
small, each skipped once its result is there. Nothing of it says anything about real tissue."""

import os
import sys
from pathlib import Path

import yaml

from lib.command import (
    EXIT_DONE,
    EXIT_FINDING,
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
TRAINING = "data_dir=pcam epochs=3 crop_epochs=2 warmup_epochs=1"
SEARCHED = "data_dir=pcam limit_train=800 limit_valid=400 crop_epochs=1 warmup_epochs=0.5"
TWIN = "data_dir=pcam epochs=2 limit_train=512 limit_valid=128 crop_epochs=1 warmup_epochs=0.5"
BENCHMARK = "--seconds 0.1 --repeats 1 --batch-sizes 1,64 --allow-noise"
CASES = "--cases default,fp32,apart,read,memory_copy,matrix_product"


@script
def main(argv=None) -> int:
    parser = Parser(description="A journal from synthetic slides, from nothing.")
    parser.add_argument("folder", type=place, metavar="DIR", help="what is there already is kept")
    folder = Path(parser.parse_args(argv).folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    make_demo()
    print_result({"page": str(folder / "journal.html")})
    return EXIT_DONE


def make(product: str, name: str, *arguments, needed=True) -> None:
    """Run a script unless its product, a pattern, is there. Raises BadInput where it fails, unless
    the journal can do without.
    """
    if any(Path().glob(product)):
        return
    words = " ".join(map(str, arguments)).split()
    say(f"demo: {name} {' '.join(words)}")
    try:
        run_script(name, *words, codes=(EXIT_DONE, EXIT_FINDING), shows_progress=True)
    except BadInput:  # the script has said why
        if needed:
            raise BadInput(f"{name} failed: mend that, and call this again to go on") from None
        say(f"note: {product} could not be made; the journal says so")


def make_demo() -> None:
    """Draw, audit, train, compare, search, audit the model, benchmark, and write the journal of it
    all, in the working folder.
    """
    # patches, clean and damaged, and what the audit finds in them
    draw = ("prepare.py", "synthetic --valid 800 --test 0 --train")
    damage = [f"--plant={planted}" for planted in PLANTED.split()]
    make("pcam/truth.csv", *draw, "2000 --to pcam")
    make("damaged/truth.csv", *draw, "1200 --to damaged --float32", *damage)
    audit = ("audit.py", "data damaged --out audit-damaged", CHECKS)
    make("audit-damaged/audit.html", *audit)
    make("audit-twin/twin.html", "audit.py", "twin --out audit-twin", TWIN)

    # three seeds
    for seed in (1, 2, 3):
        product = f"runs/*-plain-s{seed}-*/summary.json"
        make(product, "train.py", "--runs runs name=plain", TRAINING, f"seed={seed}")

    # a search, and its best finalist as the champion
    Path("space.yaml").write_text(yaml.safe_dump(SPACE))
    plan = ("sweep.py", "plan space.yaml --name demo --sweeps sweeps", SEARCHED)
    make("sweeps/demo/plan.json", *plan)
    options = "demo --sweeps sweeps --runs runs --processes 2"
    for rung in (0, 1):
        promote = ("sweep.py", "promote", options, "--finish --rung", rung)
        make(f"sweeps/demo/rung-{rung + 1}.json", *promote)
    make("sweeps/demo/champion.json", "sweep.py", "champion", options)
    best = read_json("sweeps/demo/champion.json")["finalists"][0]["run"]
    champion = ("jobs/champion.py", best, "--data pcam --assets assets")
    make("audit-champion/findings.json", *champion, needed=False)
    benchmark = ("benchmark.py", "train --data pcam --out bench/demo", BENCHMARK, CASES)
    make("bench/demo/benchmark.json", *benchmark, needed=False)

    make("JOURNAL.md", "report.py", "journal JOURNAL.md")
    journal = Path("JOURNAL.md")
    text = journal.read_text(encoding="utf-8")
    journal.write_text(text.replace("Group: to be filled in", f"Group: none. {REMARK}"), "utf-8")
    run_script("report.py", "journal", journal, codes=(EXIT_DONE, EXIT_FINDING))


if __name__ == "__main__":
    sys.exit(main())
