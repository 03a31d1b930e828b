"""The questions of the journal, in their order, and for each what the files and the code say to
it.
"""

from pathlib import Path

import numpy as np

from lib.blocks import Code, Table, Words, table_of
from lib.command import BadInput, one_line
from lib.config import plain
from lib.figures import EPOCH_PANELS, column, plot_columns, plot_decisions
from lib.report.drawings import plot_commits, plot_runs
from lib.report.evidence import CHAMPION, KEPT, Evidence, find_code, git, read_code
from lib.report.parts import Drawing
from lib.report.runs import GRADIENTS, average_scores, read_run
from lib.runpage import SHOWN_SCORES
from lib.sources import locate_sources

CANNOT = "**Cannot be answered**, a file that it cites is damaged"
# what damage in evidence provokes
OF_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError)
DRAWN, MODEL, SEARCH = "assets/journal", "assets/model", f"{KEPT}/search"
PAGE = "journal.html"  # has every row of a long table
PLAN, AUDIT, TWIN = (
    f"{SEARCH}/plan.json",
    f"{KEPT}/audit/findings.json",
    f"{KEPT}/twin/findings.json",
)
BENCHMARKS, SWEEP = "assets/benchmark*/benchmark.json", "sweep SPACE=assets/space.yaml"
PRECISIONS = ("fp32", "bf16", "fp16")
BENCH_COLUMNS = ("partition", "node_type", "gpu", "job_id", "what", "case", "model", "precision")
BENCH_COLUMNS += ("batch_size", "images_per_s", "low", "high", "factor", "memory_bytes", "status")
NUM_COMMITS, NUM_SPIKES, NUM_ERRORS = 15, 3, 8
WINDOW, SPIKE = 101, 2.0  # a spike: so many times the median of the steps around it
SETUP = (
    "model",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "schedule",
    "warmup_epochs",
    "weight_decay",
    "ema_decay",
)
SETUP += (
    "precision",
    "crop",
    "crop_epochs",
    "stain_jitter",
    "brightness_jitter",
    "limit_train",
    "views",
    "select_metric",
)
METRICS = (
    ("epochs.csv", "val_loss", "log loss on validation (nats)", "linear"),
    ("epochs.csv", "val_auc", "ROC-AUC on validation", "linear"),
    ("epochs.csv", "val_f2", "F2 at 0.5 on validation", "linear"),
)
# section, then: key of its answer | question | Make target that measures what is missing | code
# that is quoted
QUESTIONS = """
1 Reproducibility
sources | Sources of non-determinism, and how each is controlled | |
control | The exact code | | lib/seeding.py: seed_everything, set_determinism, position_bits; lib/training.py: compute_gradients
twins | Twin runs: identical or not, and where they part | twin |
2 Data
counts | Partitioning and final counts per split and class | audit DATA=data/pcam |
leakage | How leakage is prevented, and where statistics are computed | audit DATA=data/pcam \
  | lib/groups.py: group_of_rows; lib/batches.py: fold_of_rows; lib/augment.py: PCAM_MEAN, PCAM_STD
nested | Is nested cross-validation called for | |
size | Why the file is larger with fewer patches, and the mend | audit DATA=data/pcam |
poisoning | Which kind of poisoning, with evidence | audit DATA=data/pcam |
3 Configuration
parameters | The centralised parameters | | config.yaml:
loading | How they are loaded | | lib/config.py: load_config, config_from_dict, coerce
config_changes | What it changes | |
config_risks | What can still go wrong | |
4 Dynamics
gradient_norm | Global gradient norm per step, and why per step | seeds SEEDS=1,2,3 | lib/training.py: training_step
spikes | What the spikes are | seeds SEEDS=1,2,3 |
learning_rate | Learning rate over time, the scheduler, and why it decays late | seeds SEEDS=1,2,3 \
  | lib/training.py: learning_rate
5.1 Tracking
metrics | Two metrics, and why | | lib/metrics.py: compute_fbeta, compute_auc
spread | Mean and deviation over the seeds | seeds SEEDS=1,2,3 |
printing | Why printing does not scale | |
tracker | The tracker's initialisation | | lib/rundir.py: create_run, environment
tracked | Evidence: config and commit, environment, metrics, plots, checkpoints | train SEED=1 |
reproduce | The steps that reproduce a run from its folder | train SEED=1 |
new_data | Loading the checkpoint for new data | | lib/checkpoint.py: load_model
deployment | Deployment risks, and what the program does about each | |
5.2 Hyper-parameters
space | Search space, and why | sweep SPACE=assets/space.yaml |
trials | Parallel coordinates | sweep SPACE=assets/space.yaml |
champion | The champion, with its confusion matrix | sweep SPACE=assets/space.yaml |
threshold | Why 0.5 is not the clinical threshold: precision, recall and cost | audit-model |
baselines | Comparison with the trivial baselines | sweep SPACE=assets/space.yaml |
6 Slices and errors
errors | False positives and false negatives | audit-model |
slices | A slice, how it is isolated, and its score against the global one | audit-model |
global_score | What a global score hides | audit-model |
7 Collaboration and CI
consolidation | Consolidation | |
checks | Pull request and CI evidence | | .github/workflows/ci.yml: on:, jobs:; CONTRIBUTING.md: Pull request
cpu_build | Why CI installs the CPU build | | .github/workflows/ci.yml: torch-backend
conflict | A merge conflict | |
graph | The graph of the last fifteen commits | |
8 Benchmark
throughput | How throughput is measured | | lib/runlog.py: add_step; lib/benchmark/timing.py: measure, rate_of_repeat
precision | What precision changes | bench PARTITION=thin_course OUT=assets/benchmark |
another_day | Why another day can be slower | |
batch_one | Throughput at batch 1 | bench PARTITION=thin_course OUT=assets/benchmark |
scaling | Scaling over batch size, for a small and a large model | bench PARTITION=thin_course OUT=assets/benchmark |
bottleneck | The bottleneck | bench PARTITION=thin_course OUT=assets/benchmark |
9 Documentation
readme | README with installation, data, training, inference | |
stick | The files for a USB stick that runs the model offline | | README.md: On the stick:; lib/audit/checklist.py: PARTS
Checklist
checklist | What is handed in | |
"""


def read_questions() -> dict[str, list[tuple[str, ...]]]:
    """QUESTIONS as {section: [(key, question, target, code)]}."""
    sections = {}
    for line in QUESTIONS.strip().replace("\\\n", "").splitlines():
        key, *rest = (part.strip() for part in line.split("|"))
        if rest:
            sections[[*sections][-1]].append((key, *rest))
        else:
            sections[key] = []
    return sections


def answer(e: Evidence, key: str, target: str, code: str) -> list:
    """All that is known to a question: the team's words, what the files say, and the code."""
    words = (e.said.get("answers") or {}).get(key)
    parts = [Words(words.strip())] if words else []
    try:
        measured = ANSWERS[key](e) if key in ANSWERS else []
    except (BadInput, *OF_DAMAGE) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        measured = [Words(f"{CANNOT}: {target or key} ({reason})")]
    if target and not measured:
        measured = [missing(target)]
    return parts + measured + quote(e, code)


def missing(target: str) -> Words:
    return Words(f"**Not measured yet**: run `make {target}`.")


def quote(e: Evidence, code: str) -> list[Code]:
    """`file: name, name; file: name` as quotes: of lib/ and config.yaml as they were when the runs
    were made, if they were.
    """
    made = next((e.json(f"{run}/meta.json").get("commit") for run in seeds(e)), None)
    quotes = []
    for item in filter(None, code.split(";")):
        file, _, names = item.strip().partition(":")
        is_of_runs = made and file.startswith(("lib/", "config.yaml"))
        for name in names.split(","):
            for commit in [made, e.commit] if is_of_runs else [e.commit]:
                line, text = find_code(file, read_code(commit, file), name.strip())
                if line:
                    remark = ", the commit of the runs" if commit == made else ""
                    quotes.append(Code(text, f"{file}:{line} at {commit[:10]}{remark}"))
                    break
    return quotes


# shapes that several answers share: nothing where there is nothing


# shapes that several answers share: nothing where there is nothing


def table(header, rows, *sources: str, full: str = "") -> list[Table]:
    return [Table(list(header), rows, sources, full)] if rows else []


def table_of_rows(rows, *sources: str, columns=()) -> list[Table]:
    return [table_of(rows, columns, sources=sources)] if rows else []


def picture(name: str, title: str, sources, plot, data, *rest) -> list[Drawing]:
    """A figure that `plot(data, *rest)` draws from files."""
    return (
        [Drawing(f"{DRAWN}/{name}.png", title, tuple(sources), lambda: plot(data, *rest))]
        if len(data)
        else []
    )


def handed_over(e: Evidence, png: str, title: str, *sources: str) -> list[Drawing]:
    """A figure that another script has drawn from `sources`, under a name of the journal's own."""
    name = "-".join(png.split("/")[-2:])
    return [Drawing(f"{DRAWN}/{name}", title, (png, *sources))] if e.has(png) else []


def csv_table(e: Evidence, name: str, rows=None) -> list[Table]:
    """A CSV, or some rows of one, numbers as numbers."""
    rows = e.csv(name) if rows is None else rows
    cells = [[*map(number, row.values())] for row in rows]
    return table(rows[0], cells, name, full=PAGE) if rows else []


def number(text):
    """A cell of a CSV as an int or a float where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            pass
    return text


def findings(e: Evidence, audit: str, *checks: str) -> list[Table]:
    """Findings of an audit whose check begins with one of these."""
    columns = ("severity", "check", "split", "count", "measured", "advice")
    rows = e.findings(audit, *checks)
    return table_of_rows(rows, f"{KEPT}/{audit}/findings.json", columns=columns)


def proofs(e: Evidence, name: str) -> list[Table]:
    """What proofs measured, from their JSON: parts with a count, or with rows of what was asked and
    measured.
    """
    rows = []
    for part, proof in e.json(name).items():
        commit = proof["commit"]
        if "count" in proof:
            held = f"{proof['held']} of {proof['count']}"
            rows.append([part, proof.get("remark"), held, commit])
        else:
            for row in proof["rows"]:
                rows.append([row["asked"], row["measured"], plain(row["held"]), commit])
    return table(("proof", "measured", "held", "commit"), rows, name)


def seeds(e: Evidence) -> list[str]:
    """Folders of the runs that differ in the seed alone."""
    return [name.rpartition("/")[0] for name in e.names(f"{KEPT}/seeds/*/config.yaml")]


def finished(e: Evidence) -> list[str]:
    """These folders, and the champion's."""
    return [run for run in [*seeds(e), CHAMPION] if e.has(f"{run}/summary.json")]


def of_seeds(e: Evidence, file: str) -> tuple[dict[tuple[str, str], list[dict]], tuple[str, ...]]:
    """Rows of a CSV of each of these runs, by (`seed N`, the CSV), and the names of the files."""
    tables = {}
    for run in seeds(e):
        label = f"seed {read_run(e.root / run)['seed']}"
        tables[label, file] = e.csv(f"{run}/{file}")
    return tables, tuple(f"{run}/{file}" for run in seeds(e))


def gallery(e: Evidence, kind: str, title: str, page: str) -> list:
    """Pictures of patches that journal.yaml names, with its remark; else where the local ones
    are.
    """
    published, name = e.said.get("pictures") or {}, f"{KEPT}/pictures/{kind}.png"
    if published.get(kind) and e.has(name):
        return [Drawing(name, f"{title}. {published.get('remark') or ''}".strip(" ."), (name,))]
    words = (
        "Pictures are published only where journal.yaml names them, under `pictures`; they are in"
        f" {page}."
    )
    return [Words(words)]


def flat(values: dict, prefix: str = ""):
    """Numbers and texts of nested objects, as [path, value]."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, str)):
            yield [f"{prefix}{key}", value]


# 1 and 2: reproducibility, data


def sources(e: Evidence) -> list:
    rows = locate_sources(lambda name: read_code(e.commit, name))
    cells = [[row["source"], row["control"], ", ".join(row["where"])] for row in rows]
    return table(("source", "control", f"where, at {e.commit[:10]}"), cells)


def twins(e: Evidence) -> list:
    line = f"{KEPT}/twin/timeline.csv"
    rows = e.csv(line)
    if not rows:
        return []
    num_equal = sum("0" not in row.values() for row in rows)  # no step is numbered 0
    words = f"{num_equal:,} of {len(rows):,} traced steps are equal to the bit in every quantity."
    parts = [Words(words, sources=(line,))]
    (finding,) = e.findings("twin", "runs")
    for side in finding["rows"]:
        for name in ("commit", "weights_sha256"):
            side[name] = str(side[name])[:12]
    parts += table_of_rows(finding["rows"], TWIN) + findings(e, "twin")
    title = "Twin runs: what was equal to the bit at which step"
    parts += handed_over(e, f"{KEPT}/twin/timeline.png", title, line)
    parts += proofs(e, "assets/reproducibility.json")
    return parts + proofs(e, "assets/reproducibility_sample.json")


def counts(e: Evidence) -> list:
    rows, used = [], [f"{run}/meta.json" for run in dict.fromkeys(finished(e)[-1:] + seeds(e)[:1])]
    for name in used:
        for split, row in e.json(name)["rows"].items():
            num_left_out = sum(row["left_out"].values())
            row |= {"run": name.split("/")[-2], "split": split, "left_out": num_left_out}
            rows.append(row)
    columns = ("run", "split", "num", "num_negative", "num_positive", "left_out")
    parts = table_of_rows(rows, *used, columns=columns)
    parts += findings(e, "audit", "balance", "prior shift", "agreement")
    drawn = f"{KEPT}/audit"
    parts += handed_over(e, f"{drawn}/counts.png", "Patches per split and class", AUDIT)
    title = "What the intact patches of each split look like"
    return parts + handed_over(e, f"{drawn}/histograms.png", title, f"{drawn}/histograms.csv")


def leakage(e: Evidence) -> list:
    return findings(
        e, "audit", "leak", "shared slides", "overlapping", "duplicates", "near duplicates", "drift"
    )


def size(e: Evidence) -> list:
    rows, name = [], "assets/audit.json"
    for finding in e.findings("audit", "size"):
        rows += [{"split": finding["split"]} | row for row in finding["rows"]]
    parts = findings(e, "audit", "size") + table_of_rows(rows, AUDIT)
    for row in e.json(name).get("damaged", {}).get("rows", []):
        if "size" in row["asked"]:
            words = f"A damaged edition, made from intact patches: {row['measured']}."
            parts.append(Words(words, sources=(name,)))
    return parts


def poisoning(e: Evidence) -> list:
    checks = ("values", "triggers", "label", "unreadable", "exchanged", "names", "meta")
    parts = findings(e, "audit", *checks)
    if not parts:
        return []
    parts += gallery(e, "damage", "Suspect patches", "audit.html of the audit")
    return parts + csv_table(e, f"{KEPT}/audit/power.csv") + proofs(e, "assets/audit.json")


# 4: dynamics


def gradient_norm(e: Evidence) -> list:
    curves = [curve for curve in GRADIENTS if curve[1] == "grad_norm"]
    title = f"Global gradient norm per step, before clipping, with {len(seeds(e))} seeds"
    return seed_picture(e, "gradient-norm", title, "steps.csv", curves)


def learning_rate(e: Evidence) -> list:
    curves = [curve for curve in GRADIENTS if curve[1] != "grad_norm"]
    title = "Training loss and learning rate per step"
    return seed_picture(e, "learning-rate", title, "steps.csv", curves)


def seed_picture(e: Evidence, name: str, title: str, file: str, curves) -> list[Drawing]:
    """Curves of the runs that differ in the seed alone, and their mean."""
    tables, sources = of_seeds(e, file)
    return picture(name, title, sources, plot_runs, tables, curves, True)


def spikes(e: Evidence) -> list:
    tables, names = of_seeds(e, "steps.csv")
    rows, counts_of_runs = [], []
    for (run, _), steps in tables.items():
        norm, loss, lr = (column(steps, name) for name in ("grad_norm", "loss", "lr"))
        ratio, usual_loss = norm / running_median(norm), running_median(loss)
        for place in np.argsort(-ratio)[:NUM_SPIKES].tolist():
            shown = [values[place].item() for values in (norm, ratio, loss, usual_loss, lr)]
            step = steps[place]
            rows.append([run, int(step["step"]), int(step["epoch"]), *shown])
        is_spike = ratio > SPIKE
        num_hard = (is_spike & (loss > usual_loss)).sum()
        num_early = (is_spike & (column(steps, "epoch") == 1)).sum()
        counts_of_runs.append(
            f"{run}: {is_spike.sum()} of {len(steps):,} steps, {num_hard} with a loss above the"
            f" median, {num_early} in the first epoch"
        )
    if not rows:
        return []
    words = (
        f"A spike is a norm above {SPIKE:g} times the median of the {WINDOW} steps around it."
        f" {'; '.join(counts_of_runs)}."
    )
    header = ["run", "step", "epoch", "gradient norm", "times the median"]
    header += ["loss of its batch", "median loss", "learning rate"]
    return [Words(words, sources=names), *table(header, rows, *names)]


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of the WINDOW values around each of values (N,), fewer at the ends: (N,)."""
    padded = np.pad(values, WINDOW // 2, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), 1)


# 5: tracking, hyper-parameters


# 5: tracking, hyper-parameters


def spread(e: Evidence) -> list:
    runs = [read_run(e.root / run) for run in seeds(e)]
    if not runs:
        return []
    rows, means = [], average_scores(runs, "seed")
    for title, (score, constant) in SHOWN_SCORES.items():
        row = {"score": title}
        for run in runs:
            row[f"seed {run['seed']}"] = run[f"val_{score}"]
        mean = means[f"val_{score}"]
        row |= {"mean": mean["mean"], "deviation": mean["deviation"]}
        row |= {"95% from": mean["low"], "to": mean["high"], "constant answer": runs[0][constant]}
        rows.append(row)
    title = f"Loss and metrics on validation, epoch by epoch, one view, with {len(runs)} seeds"
    drawn = seed_picture(e, "metrics", title, "epochs.csv", METRICS)
    return table_of_rows(rows, *(f"{run}/summary.json" for run in seeds(e))) + drawn


def tracked(e: Evidence) -> list:
    rows, files = [], []
    for run in finished(e):
        meta, summary = e.json(f"{run}/meta.json"), e.json(f"{run}/summary.json")
        machine, versions = meta["machine"], meta["versions"]
        is_patched = meta.get("patched") or meta.get("uncommitted_patch")
        packages = f"python {versions['python']}, torch {versions['torch']}"
        row = {
            "run": Path(run).name,
            "commit": (meta["commit"] or "none")[:10] + (", patched" if is_patched else ""),
            "config": e.digest(f"{run}/config.yaml"),
            "environment": f"{packages}, {machine['cpu']}, {machine['device']}",
            "job": meta["job"].get("SLURM_JOB_ID", "none"),
            "AUC": summary["val_auc"],
            "F2": summary["val_f2"],
            "final weights": summary["weights_sha256"][:12],
        }
        rows.append(row)
        files += [f"{run}/{name}" for name in ("config.yaml", "meta.json", "summary.json")]
    parts = table_of_rows(rows, *files)
    epochs, runs = f"{CHAMPION}/epochs.csv", f"{KEPT}/runs.csv"
    title = "The champion, epoch by epoch, one view, beside constant answers"
    panels = "epoch", EPOCH_PANELS
    parts += picture("champion", title, [epochs], plot_columns, e.csv(epochs), *panels)
    if e.has(runs):
        num = len(e.csv(runs))
        words = f"All {num} runs that lay in runs/, with the SHA-256 of each summary.json:"
        parts += [Words(words), *csv_table(e, runs)]
    return parts


def reproduce(e: Evidence) -> list:
    if not finished(e):
        return []
    run = finished(e)[0]
    commit = e.json(f"{run}/meta.json")["commit"] or "COMMIT"
    data, digest = (read_run(e.root / run)[key] for key in ("data_dir", "weights_sha256"))
    steps = (
        f"cp {run}/config.yaml again.yaml\ngit checkout {commit}\nmake setup\npython prepare.py"
        f" verify {data}\npython train.py --config again.yaml"
    )
    words = f"It is reproduced if the new summary.json has the `weights_sha256` `{digest}`."
    sources = (f"{run}/summary.json", f"{run}/config.yaml")
    return [Code(steps, f"{run}, once more"), Words(words, sources=sources)]


def new_data(_e: Evidence) -> list:
    return [
        Code(
            f"python inference.py --ckpt {CHAMPION} patches/ --out predictions.csv",
            "a checkpoint on new patches",
        )
    ]


def space(e: Evidence) -> list:
    plan = e.json(PLAN)
    if not plan:
        return []
    rows = []
    for key, spec in plan["ranges"].items():
        ((kind, bounds),) = spec.items()
        rows.append([key, kind, plain(bounds)])
    words = (
        f"{len(plan['trials'])} trials of a {plan['design']} design, rungs of"
        f" {plain(plan['rungs'])} epochs, frozen beforehand with the SHA-256"
        f" `{plan['sha256'][:12]}`."
    )
    return [Words(words, sources=(PLAN,)), *table(("parameter", "scale", "range"), rows, PLAN)]


def trials(e: Evidence) -> list:
    used = (PLAN, f"{SEARCH}/rung-1.json")
    plan, rung = map(e.json, used)
    rows = []
    for trial, score in rung.get("scores_before", {}).items():
        is_promoted = plain(trial in rung["trials"])
        rows.append([trial, *plan["trials"][trial].values(), score, is_promoted])
    drawn = handed_over(e, f"{SEARCH}/trials.png", "The search", *used)
    header = ("trial", *plan.get("ranges", ()), "AUC after the first rung", "promoted")
    return drawn + table(header, rows, *used, full=PAGE)


def champion(e: Evidence) -> list:
    ended, scores = f"{SEARCH}/champion.json", f"{CHAMPION}/summary.json"
    parts, search, summary = [missing(SWEEP)], e.json(ended), e.json(scores)
    if search:
        columns = ("trial", "mean", "deviation", "low", "high", "num")
        finalists = table_of_rows(search["finalists"], ended, columns=columns)
        parts = [Words(f"{search['note']}."), *finalists]
    if summary:
        row = {
            "checkpoint": f"{CHAMPION}, uncalibrated, at 0.5",
            "true negatives": summary["val_tn"],
            "false positives": summary["val_fp"],
            "false negatives": summary["val_fn"],
            "true positives": summary["val_tp"],
        }
        parts += table_of_rows([row], scores)
    name, judged = f"{MODEL}/predictions.csv", f"{MODEL}/scores.json"
    rows = [row for row in e.csv(name) if row.get("label") and row["probability"]]
    if rows:
        labels, probs = column(rows, "label").astype(int), column(rows, "probability")
        at = e.json(judged)["checkpoint"]["threshold"]
        title = (
            f"The champion on {len(rows):,} patches of validation, calibrated, at its threshold"
            f" {at:.3g}"
        )
        parts += picture("decisions", title, [name, judged], plot_decisions, labels, probs, at)
    return parts


def threshold(e: Evidence) -> list:
    rules, scores = f"{MODEL}/thresholds.csv", f"{MODEL}/scores.json"
    parts = csv_table(e, rules) + table(("score", "value"), [*flat(e.json(scores))], scores)
    title, used = "What thresholds mean, with 95% bands", (f"{MODEL}/curves.csv", rules, scores)
    parts += handed_over(e, f"{MODEL}/curves.png", title, *used)
    title = "Reliability; the area of a marker shows how many patches are in its bin"
    return parts + handed_over(e, f"{MODEL}/reliability.png", title, f"{MODEL}/reliability.csv")


def baselines(e: Evidence) -> list:
    name = f"{CHAMPION}/summary.json"
    summary, rows = e.json(name), []
    if summary:
        for title, (score, constant) in SHOWN_SCORES.items():
            rows.append([title, summary[f"val_{score}"], summary[constant]])
    return table(("score on validation", "champion", "constant answer"), rows, name)


# 6: slices and errors


# 6: slices and errors


# 6: slices and errors


def errors(e: Evidence) -> list:
    name = f"{MODEL}/errors.csv"
    rows = sorted(e.csv(name), key=lambda row: float(row["probability"]))
    if not rows:
        return []
    false_alarms = [row for row in reversed(rows) if row["label"] == "0"]
    missed = [row for row in rows if row["label"] == "1"]
    words = (
        f"{len(false_alarms):,} false positives and {len(missed):,} false negatives at the"
        " checkpoint's threshold; the most certain of each:"
    )
    worst = csv_table(e, name, false_alarms[:NUM_ERRORS] + missed[:NUM_ERRORS])
    where = f"{MODEL} where the audit ran"
    shown = gallery(e, "errors", "False positives and false negatives", where)
    return [Words(words), *worst, *shown]


def slices(e: Evidence) -> list:
    name, scores = f"{MODEL}/slices.csv", f"{MODEL}/scores.json"
    title = (
        "Scores by slice, with 95% intervals, beside those of all patches (dotted); orange:"
        " confirmed to be worse, yellow: worse on one half"
    )
    return csv_table(e, name) + handed_over(e, f"{MODEL}/slices.png", title, name, scores)


def global_score(e: Evidence) -> list:
    name, scores = f"{MODEL}/slices.csv", f"{MODEL}/scores.json"
    overall = []
    for score, interval in e.json(scores).get("global", {}).items():
        overall.append({"score on the half that judges slices": score} | interval)
    rows = [row for row in e.csv(name) if row.get("auc")]
    rows.sort(key=lambda row: float(row["auc"]))
    extremes = []
    for title, row in zip(("lowest AUC", "highest AUC"), rows[:1] + rows[-1:], strict=False):
        extremes.append({"slice with the": title} | row)
    return table_of_rows(overall, scores) + csv_table(e, name, extremes)


# 7: collaboration


# 7: collaboration


# 7: collaboration


# 7: collaboration


def consolidation(e: Evidence) -> list:
    log = git("log", "--merges", "-8", "--abbrev=10", "--format=%h%x09%s", e.commit, "--")
    return table(("merge", "subject"), [line.split("\t", 1) for line in log.splitlines()])


def conflict(e: Evidence) -> list:
    name = f"{KEPT}/git/conflict.diff"
    if not e.has(name):
        return [Words("No merge in this repository's history was stopped by a conflict.")]
    text = (e.root / name).read_text(encoding="utf-8").rstrip()
    words = (
        "The newest one, as `git show --remerge-diff` tells it: what the two sides had made of one"
        " place, and what was kept."
    )
    return [Words(words, sources=(name,)), Code(text, text.partition("\n")[0])]


def graph(e: Evidence) -> list:
    log = git("log", "--graph", f"-{NUM_COMMITS}", "--format=%x09%h  %s", e.commit, "--").rstrip()
    if not log:
        return []
    title = f"The last {NUM_COMMITS} commits up to {e.commit[:10]}"
    drawn = picture("commits", title, [], plot_commits, log.splitlines())
    return [*drawn, Code(log.replace("\t", " "), "git log --graph")]


# 8: benchmark


# 8: benchmark


def bench_rows(e: Evidence) -> tuple[list[dict], list[str]]:
    """Rows of the benchmarks, one for each partition, that time a model; and their files."""
    names, rows = e.names(BENCHMARKS), []
    for name in names:
        rows += e.json(name)["rows"]
    return [row for row in rows if row["what"] in ("infer", "train")], names


def precision(e: Evidence) -> list:
    timed, names = bench_rows(e)
    keys, rates_of = ("partition", "what", "model", "batch_size"), {}
    for row in timed:
        if row.get("images_per_s") and row["case"] in ("default", *PRECISIONS):
            rates = rates_of.setdefault(tuple(row[key] for key in keys), {})
            rates[row["precision"]] = row["images_per_s"]
    rows = []
    for key, rates in rates_of.items():
        if len(rates) > 1:
            rows.append([*key, *map(rates.get, PRECISIONS)])
    header = ["partition", "what", "model", "batch size"]
    return table(header + [f"{name}, images/s" for name in PRECISIONS], rows, *names)


def batch_one(e: Evidence) -> list:
    timed, names = bench_rows(e)
    rows = [row for row in timed if row.get("batch_size") == 1]
    return table_of_rows(rows, *names, columns=BENCH_COLUMNS)


def scaling(e: Evidence) -> list:
    timed, names = bench_rows(e)
    rows = [row for row in timed if row["case"] == "default"]
    parts = table_of_rows(rows, *names, columns=BENCH_COLUMNS)
    for name in names:
        parts += bench_picture(e, name, "scaling", "Throughput over batch size")
    return parts


def bench_picture(e: Evidence, name: str, drawn: str, title: str) -> list[Drawing]:
    """A figure beside a benchmark.json, its partition in the title."""
    partition = e.json(name)["rows"][0]["partition"]
    png = f"{name.rpartition('/')[0]}/{drawn}.png"
    return handed_over(e, png, f"{title}, {partition}", name)


def bottleneck(e: Evidence) -> list:
    parts, title = [], "Stages of a batch, and what the machine would allow"
    for name in e.names(BENCHMARKS):
        verdict = e.json(name).get("verdict") or {}
        partition = e.json(name)["rows"][0]["partition"]
        sentence = f"{partition}: {verdict.get('sentence', '')}"
        rows = [pair for pair in flat(verdict) if not pair[0].endswith("sentence")]
        parts += [Words(sentence, sources=(name,)), *table(("what", "value"), rows, name)]
        parts += bench_picture(e, name, "stages", title)
    proof = "assets/benchmark_proof.json"
    columns = ("what", "held", "total", "commit")
    return parts + table_of_rows([*e.json(proof).values()], proof, columns=columns)


# 9: documentation, and the checklist


# 9: documentation, and the checklist


# 9: documentation, and the checklist


def readme(e: Evidence) -> list:
    rows = []
    for number, line in enumerate(read_code(e.commit, "README.md").splitlines(), 1):
        if line.startswith("## "):
            rows.append([line.removeprefix("## "), f"README.md:{number}"])
    return table(("section", f"where, at {e.commit[:10]}"), rows)


def stick(e: Evidence) -> list:
    name = "assets/handover.json"
    words = "`make handover DEST=DIR` writes the folder; `python audit.py handover DIR` checks it."
    rows = e.json(name).get("rows", [])
    return [Words(words), *table_of_rows(rows, name, columns=("what", "held", "measured"))]


def checklist(e: Evidence) -> list:
    tracked = git("ls-tree", "-r", "--name-only", e.commit).splitlines()
    shell = [name for name in tracked if name.endswith(".sh")]
    slurm = [name for name in shell if "SLURM" in read_code(e.commit, name)]
    best = f"{CHAMPION}/best.pt"
    rows = [
        ["repository linked", e.said.get("repository")],
        ["best checkpoint in the repository", f"{best}, SHA-256 {e.digest(best)}"],
        ["inference.py works", f"python inference.py --ckpt {CHAMPION} patches/"],
        ["every Slurm script in the repository", ", ".join(slurm)],
        ["every image by a relative path under assets/", f"{DRAWN}/, {KEPT}/"],
        ["names and ids on the first page", f"{len(e.said.get('members') or [])} listed"],
    ]
    words = "`make checklist` judges each item, and runs inference.py to do so."
    return [*table(("item", "evidence"), rows), Words(words)]


def front_page(e: Evidence) -> list[tuple[str, list]]:
    """Group, repository, base set-up and members, where the checklist looks for them: [(title,
    parts)].
    """
    about = [f"Group: {e.said.get('group')}", f"Repository: {e.said.get('repository')}"]
    if e.said.get("remark"):
        about.append(e.said["remark"].strip())
    about.append(
        "Made by `report.py journal` from the files that it names, at commit"
        f" `{e.commit or 'none'}`."
    )
    base = [missing("train SEED=1")]
    if finished(e):
        run = finished(e)[-1]
        config = read_run(e.root / run)
        rows = [[key, plain(config.get(key))] for key in SETUP]
        base = table(("parameter", "value"), rows, f"{run}/config.yaml")
    members = [f"{member['name']} ({member['id']})" for member in e.said.get("members") or []]
    return [
        ("", [*map(Words, about)]),
        ("Base set-up chosen", base),
        ("Members", [*map(Words, members)]),
    ]


ANSWERS = {
    key: globals()[key]
    for questions in read_questions().values()
    for key, *_ in questions
    if key in globals()
}
