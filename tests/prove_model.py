"""The figures of the model audit, at length: a table of what was asked and measured, as JSON and Markdown.

python tests/prove_model.py [PART ...] --data DIR [--ckpt assets/champion] [--out assets/model/proof]
"""

import shutil
import tempfile
from pathlib import Path

from conftest import REPOSITORY
from proofs import made_now, write_markdown
from prove_audit import row, run

from lib.command import EXIT_DONE, EXIT_FINDING, BadInput, Parser, print_result, say, script
from lib.logger import read_csv, read_json, write_json

TRAINING = ("epochs=4", "crop_epochs=3", "warmup_epochs=1", "views=1")
MOST_ECE = 0.03


def prove_synthetic(_args, scratch: Path) -> list[dict]:
    """Slides of a blurred scanner, which training has not seen, in valid: found and confirmed as a slice by sharpness."""
    run("prepare.py", "synthetic", "--to", scratch / "data", "--train", 6_000, "--valid", 240, "--test", 0)
    run("prepare.py", "synthetic", "--to", scratch / "seen", "--train", 120, "--valid", 3_600, "--test", 0, "--plant", BLURRED)
    for path in (*(scratch / "seen").glob("*_valid_*"), scratch / "seen" / "truth.csv"):
        shutil.move(path, scratch / "data" / path.name)
    trained = run("train.py", "--runs", scratch / "runs", f"data_dir={scratch / 'data'}", *TRAINING)
    result = run("audit.py", "model", "--ckpt", trained["run"], scratch / "data", "--out", scratch / "out")

    blurred = {r["index"] for r in read_csv(scratch / "data" / "truth.csv") if r["split"] == "valid"}
    slices = read_csv(scratch / "out" / "slices.csv")
    by_sharpness = [r for r in slices if r["feature"] == "sharpness" and r["confirmed"]]
    text = "; ".join(
        f"{r['feature']} {r['slice']}: {name} {float(r[name]):.3f}, elsewhere {float(r[f'rest_{name}']):.3f}"
        for r in by_sharpness
        for name in r["confirmed"].split()
    )
    slides = [r["slice"] for r in slices if r["feature"] == "slide" and r["confirmed"]]
    meta = read_csv(next((scratch / "data").glob("*_valid_meta.csv")))
    blurred_slides = {r["wsi"] for place, r in enumerate(meta) if str(place) in blurred}
    right = sum(name in blurred_slides for name in slides)
    rows = [row(f"{len(blurred_slides)} blurred slides of 30 in valid: confirmed by sharpness", text or "not", by_sharpness)]
    text = f"{len(slides)}, of which {right} are blurred"
    rows.append(row("slides that are confirmed by themselves (no figure asked)", text, True))
    worst = result["worst_confirmed_slice"] or {"feature": "none", "slice": "", "measure": "auc", "auc": float("nan")}
    text = f"AUC {result['auc']:.3f}; {worst['feature']} {worst['slice']}: {worst['measure']} {worst[worst['measure']]:.3f}"
    return [*rows, row("the global figure beside the worst confirmed slice", text, worst["feature"] != "none")]


def prove_sample(args, scratch: Path) -> list[dict]:
    """The champion on the real sample: calibration, slices, shortcuts."""
    result = run("audit.py", "model", "--ckpt", args.ckpt, args.data, "--out", scratch / "out", "--without-patches")
    scores = read_json(scratch / "out" / "scores.json")
    ece, fitted = {r["probabilities"]: r["ece"] for r in scores["calibration"]}, "with a temperature of the other half"
    text = "; ".join(f"{name} {value:.4f}" for name, value in ece.items())
    rows = [row(f"calibrated ECE on the other half under {MOST_ECE}", text, ece[fitted] < MOST_ECE)]
    for name in ("auc", "f2", "recall", "specificity"):
        found = scores["global"][name]
        text = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        rows.append(row(f"{name} on the other half (no figure asked)", text, True))
    worst = result["worst_confirmed_slice"]
    text = "none confirmed"
    if worst:
        name = worst["measure"]
        text = f"{worst['feature']} {worst['slice']}: {name} {worst[name]:.3f} ({worst[f'{name}_low']:.3f} to "
        text += f"{worst[f'{name}_high']:.3f}), elsewhere {worst[f'rest_{name}']:.3f}"
    rows.append(row(f"the worst confirmed of {scores['num_slices']} slices (no figure asked)", text, True))
    for found in read_csv(scratch / "out" / "shortcut.csv"):
        value, low, high = (float(found[key]) for key in ("value", "low", "high"))
        if found["measure"] != "mean move of the probability":
            text = f"{value:.3f} ({low:.3f} to {high:.3f})"
            rows.append(row(f"{found['probe']}: {found['measure']} (no figure asked)", text, True))
    return rows


BLURRED = "blurred_scanner=0.4"
PARTS = {name.removeprefix("prove_"): part for name, part in list(globals().items()) if name.startswith("prove_")}


def write_table(path: Path, results: dict) -> None:
    """The results of the parts as a table."""
    rows = []
    for name in (name for name in PARTS if name in results):
        made = f"{name}, {results[name]['date']}, {results[name]['commit']}"
        rows += [(r["asked"], r["measured"], "yes" if r["held"] else "NO", made) for r in results[name]["rows"]]
    write_markdown(path, ("asked", "measured", "held", "part, date, commit"), rows)


@script
def main(argv=None) -> int:
    parser = Parser(prog="prove_model.py", description="The figures of the model audit, on drawn slides and real patches.")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", default="data/sample", metavar="DIR", help="the imported real sample (default: data/sample)")
    parser.add_argument("--ckpt", default="assets/champion", metavar="RUN|FILE", help="default: assets/champion")
    parser.add_argument("--out", default="assets/model_audit", type=Path, metavar="OUT", help="OUT.json and OUT.md")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        raise BadInput(f"no part {unknown.pop()!r}; allowed: {', '.join(PARTS)}")
    path = args.out.with_suffix(".json")
    results = read_json(path) if path.exists() else {}
    for name in args.parts or PARTS:
        made = made_now()
        with tempfile.TemporaryDirectory(prefix="model-proof-", dir=REPOSITORY / "data") as scratch:
            rows = PARTS[name](args, Path(scratch))
        results[name] = made | {"rows": rows}
        write_json(path, results)
        for found in rows:
            say(f"{'held' if found['held'] else 'MISSED'}: {found['asked']}: {found['measured']}")
    write_table(args.out.with_suffix(".md"), results)
    missed = [found["asked"] for result in results.values() for found in result["rows"] if not found["held"]]
    print_result({"missed": missed, "table": str(args.out.with_suffix(".md"))})
    return EXIT_FINDING if missed else EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
