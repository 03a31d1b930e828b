"""What `make champion RUN=...` does: a run becomes assets/champion, calibrated, and is audited into
audit-champion, so that every figure of the champion is of one model.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.bundle import RUN_FILES
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
from lib.files import read_cache, read_json, write_json
from lib.rundir import find_run, resume_config

# in meta.json, of the machine alone: a champion is shown to others
PRIVATE = ("cwd", "host", "pid", "submitted", "earlier_starts")


@script
def main(argv=None) -> int:
    parser = Parser(prog="champion.py", description="Make a run, or a search's winner, champion.")
    add = parser.add_argument
    add("run", type=place, metavar="RUN", help="a run folder, or the folder of a search")
    add("--data", default="", metavar="DIR", help="labelled patches (default: those of the run)")
    add("--assets", default="assets", type=Path, metavar="DIR", help="default: assets")
    args, options = parser.parse_known_args(argv)  # the others are those of audit.py model
    run = find_winner(Path(args.run))
    data = args.data or resume_config(run, []).data_dir
    champion, model = args.assets / "champion", args.assets.parent / "audit-champion"
    args.assets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".champion-", dir=args.assets) as folder:
        before = Path(folder, "before")
        if champion.exists():
            champion.rename(before)
        try:
            copy_run(run, champion)
            audit = ("model", "--ckpt", champion, data, "--out", model, "--store", *options)
            codes = (EXIT_DONE, EXIT_FINDING)
            run_script("audit.py", *audit, codes=codes, shows_progress=True)
        except BaseException:
            shutil.rmtree(champion, ignore_errors=True)
            if before.exists():
                before.rename(champion)
            raise
    say(f"{run} is {champion} now; its audit is {model}")
    print_result({"run": str(run), "champion": str(champion), "model": str(model)})
    return EXIT_DONE


def find_winner(folder: Path) -> Path:
    """A finished run by its folder or name, or the winner of a search by the search's folder."""
    if (folder / "plan.json").is_file():
        if not (folder / "champion.json").is_file():
            raise BadInput(f"{folder} has no champion yet: python sweep.py champion {folder.name}")
        champion = read_json(folder / "champion.json")
        if not champion["run"]:
            raise BadInput(f"{folder}: {champion['note']}")
        folder = Path(champion["run"])
    run = find_run(folder)
    if read_cache(run / "summary.json").get("status") != "finished":
        raise BadInput(f"{run} did not finish: python train.py --resume {run}")
    return run


def copy_run(run: Path, champion: Path) -> None:
    """The files of a run that its champion has, without what tells of the machine alone."""
    champion.mkdir()
    for name in RUN_FILES:
        shutil.copy(run / name, champion)
    meta = read_json(run / "meta.json")
    meta["machine"].pop("host", None)
    public = {name: value for name, value in meta.items() if name not in PRIVATE}
    write_json(champion / "meta.json", public)


if __name__ == "__main__":
    sys.exit(main())
