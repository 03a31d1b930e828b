"""The questions of the journal, in their order, and for each what the files and the code say to
it.
"""

from pathlib import Path

import numpy as np

from lib import figures
from lib.blocks import Code, Table, Words, table_of
from lib.command import BadInput, one_line
from lib.config import plain
from lib.report import drawings
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
    try:
        found = ANSWERS[key](e) if key in ANSWERS else []
    except (BadInput, *OF_DAMAGE) as error:
        found = [Words(f"{CANNOT}: {target or key} ({type(error).__name__}: {one_line(error)})")]
    if target and not found:
        found = [missing(target)]
    return [*([Words(words.strip())] if words else []), *found, *quote(e, code)]


def missing(target: str) -> Words:
    return Words(f"**Not measured yet**: run `make {target}`.")


def quote(e: Evidence, code: str) -> list[Code]:
    """`file: name, name; file: name` as quotes: of lib/ and config.yaml as they were when the runs
    were made, if they were.
    """
    made = next((e.json(f"{run}/meta.json").get("commit") for run in seeds(e)), None)
    parts = []
    for file, _, names in (item.strip().partition(":") for item in code.split(";") if item.strip()):
        for name in map(str.strip, names.split(",")):
            for commit in (
                [made, e.commit]
                if made and file.startswith(("lib/", "config.yaml"))
                else [e.commit]
            ):
                line, text = find_code(file, read_code(commit, file), name)
                if line:
                    parts.append(
                        Code(
                            text,
                            f"{file}:{line} at"
                            f" {commit[:10]}{', the commit of the runs' * (commit == made)}",
                        )
                    )
                    break
    return parts


# shapes that several answers share: nothing where there is nothing


def table(header, rows, *sources: str, full: str = "") -> list[Table]:
    return [Table(list(header), rows, sources, full)] if rows else []


def picture(name: str, title: str, sources, plot, data, *rest) -> list[Drawing]:
    """A figure that `plot(data, *rest)` draws from files."""
    return (
        [Drawing(f"{DRAWN}/{name}.png", title, tuple(sources), lambda: plot(data, *rest))]
        if len(data)
        else []
    )


def handed_over(e: Evidence, png: str, title: str, *sources: str) -> list[Drawing]:
    """A figure that another script has drawn from `sources`, under a name of the journal's own."""
    folder, name = png.split("/")[-2:]
    copy = f"{DRAWN}/{folder}-{name}"
    return [Drawing(copy, title, (png, *sources))] if e.has(png) else []


def csv_table(e: Evidence, name: str, rows=None) -> list[Table]:
    """A CSV, or some rows of one, numbers as numbers."""
    rows = e.csv(name) if rows is None else rows
    return table(
        rows[0] if rows else (), [[*map(number, row.values())] for row in rows], name, full=PAGE
    )


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
    keys = ("severity", "check", "split", "count", "measured", "advice")
    rows = e.findings(audit, *checks)
    sources = (f"{KEPT}/{audit}/findings.json",)
    return [table_of(rows, keys, sources=sources)] if rows else []


def proofs(e: Evidence, name: str) -> list[Table]:
    """What proofs measured, from their JSON: parts with a count, or with rows of what was asked and
    measured.
    """
    rows = []
    for part, found in e.json(name).items():
        if "count" in found:
            rows.append(
                [part, found.get("remark"), f"{found['held']} of {found['count']}", found["commit"]]
            )
        else:
            rows += [
                [row["asked"], row["measured"], plain(row["held"]), found["commit"]]
                for row in found["rows"]
            ]
    return table(("proof", "measured", "held", "commit"), rows, name)


def seeds(e: Evidence) -> list[str]:
    """Folders of the runs that differ in the seed alone."""
    return [name.rpartition("/")[0] for name in e.names(f"{KEPT}/seeds/*/config.yaml")]


def finished(e: Evidence) -> list[str]:
    """These folders, and the champion's."""
    return [run for run in [*seeds(e), CHAMPION] if e.has(f"{run}/summary.json")]


def of_seeds(e: Evidence, file: str) -> tuple[dict[str, list[dict]], tuple[str, ...]]:
    """Rows of a CSV of each of these runs, by `seed N`, and the names of the files."""
    tables = {f"seed {read_run(e.root / run)['seed']}": e.csv(f"{run}/{file}") for run in seeds(e)}
    return tables, tuple(f"{run}/{file}" for run in seeds(e))


def gallery(e: Evidence, kind: str, title: str, page: str) -> list:
    """Pictures of patches that journal.yaml names, with its remark; else where the local ones
    are.
    """
    said, name = e.said.get("pictures") or {}, f"{KEPT}/pictures/{kind}.png"
    if said.get(kind) and e.has(name):
        return [Drawing(name, f"{title}. {said.get('remark') or ''}".strip(" ."), (name,))]
    return [
        Words(
            "Pictures are published only where journal.yaml names them, under `pictures`; they are"
            f" in {page}."
        )
    ]


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
    sides = [row for finding in e.findings("twin", "runs") for row in finding["rows"]]
    num_equal = 0
    for row in rows:
        _step, *are_equal = row.values()
        num_equal += set(are_equal) == {"1"}
    words = f"{num_equal:,} of {len(rows):,} traced steps are equal to the bit in every quantity."
    parts = [Words(words, sources=(line,))]
    for row in sides:
        for name in ("commit", "weights_sha256"):
            row[name] = str(row[name])[:12]
    parts += table(sides[0], [[*row.values()] for row in sides], TWIN) + findings(e, "twin")
    title = "Twin runs: what was equal to the bit at which step"
    parts += handed_over(e, f"{KEPT}/twin/timeline.png", title, line)
    parts += proofs(e, "assets/reproducibility.json")
    return parts + proofs(e, "assets/reproducibility_sample.json")


def counts(e: Evidence) -> list:
    rows, used = [], [f"{run}/meta.json" for run in dict.fromkeys(finished(e)[-1:] + seeds(e)[:1])]
    for name in used:
        for split, row in e.json(name)["rows"].items():
            cells = [
                row["num"],
                row["num_negative"],
                row["num_positive"],
                sum(row["left_out"].values()),
            ]
            rows.append([name.split("/")[-2], split, *cells])
    parts = table(("run", "split", "patches", "negative", "positive", "left out"), rows, *used)
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
    rows = [
        [found["split"], *row.values()]
        for found in e.findings("audit", "size")
        for row in found["rows"]
    ]
    parts = findings(e, "audit", "size") + table(
        ("split", "factor", "here", "official"), rows, AUDIT
    )
    for row in e.json("assets/audit.json").get("damaged", {}).get("rows", []):
        if "size" in row["asked"]:
            parts.append(
                Words(
                    f"A damaged edition, made from intact patches: {row['measured']}.",
                    sources=("assets/audit.json",),
                )
            )
    return parts


def poisoning(e: Evidence) -> list:
    found = findings(
        e, "audit", "values", "triggers", "label", "unreadable", "exchanged", "names", "meta"
    )
    if not found:
        return []
    found += gallery(e, "damage", "Suspect patches", "audit.html of the audit")
    return found + csv_table(e, f"{KEPT}/audit/power.csv") + proofs(e, "assets/audit.json")


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
    tables = {(run, file): rows for run, rows in tables.items()}
    return picture(name, title, sources, drawings.plot_runs, tables, curves, True)


def spikes(e: Evidence) -> list:
    (tables, names), rows, told = of_seeds(e, "steps.csv"), [], []
    for run, steps in tables.items():
        norm, loss, lr, epoch = (
            figures.column(steps, name) for name in ("grad_norm", "loss", "lr", "epoch")
        )
        ratio, usual_loss = norm / running_median(norm), running_median(loss)
        for at in np.argsort(-ratio)[:NUM_SPIKES].tolist():
            values = [float(column[at]) for column in (norm, ratio, loss, usual_loss, lr)]
            rows.append([run, int(steps[at]["step"]), int(epoch[at]), *values])
        spike = ratio > SPIKE
        num, hard, early = (
            spike.sum(),
            (spike & (loss > usual_loss)).sum(),
            (spike & (epoch == 1)).sum(),
        )
        told.append(
            f"{run}: {num} of {len(steps):,} steps, {hard} with a loss above the median, {early} in"
            " the first epoch"
        )
    words = (
        f"A spike is a norm above {SPIKE:g} times the median of the {WINDOW} steps around it."
        f" {'; '.join(told)}."
    )
    header = (
        "run",
        "step",
        "epoch",
        "gradient norm",
        "times the median",
        "loss of its batch",
        "median loss",
        "learning rate",
    )
    if not rows:
        return []
    return [Words(words, sources=names), *table(header, rows, *names)]


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of the WINDOW values around each of values (N,), fewer at the ends: (N,)."""
    reach = WINDOW // 2
    return np.array(
        [np.median(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]
    )


# 5: tracking, hyper-parameters


def spread(e: Evidence) -> list:
    if not (runs := [read_run(e.root / run) for run in seeds(e)]):
        return []
    rows, scores = [], average_scores(runs, "seed")
    for title, (score, constant) in SHOWN_SCORES.items():
        means = [scores[f"val_{score}"][key] for key in ("mean", "deviation", "low", "high")]
        rows.append([title, *(run[f"val_{score}"] for run in runs), *means, runs[0][constant]])
    header = (
        "score",
        *(f"seed {run['seed']}" for run in runs),
        "mean",
        "deviation",
        "95% from",
        "to",
        "constant answer",
    )
    title = f"Loss and metrics on validation, epoch by epoch, one view, with {len(runs)} seeds"
    drawn = seed_picture(e, "metrics", title, "epochs.csv", METRICS)
    return table(header, rows, *(f"{run}/summary.json" for run in seeds(e))) + drawn


def tracked(e: Evidence) -> list:
    rows, files, epochs = [], [], f"{CHAMPION}/epochs.csv"
    for run in finished(e):
        meta, summary = e.json(f"{run}/meta.json"), e.json(f"{run}/summary.json")
        patched = ", patched" * bool(meta.get("patched") or meta.get("uncommitted_patch"))
        code, versions = f"{(meta['commit'] or 'none')[:10]}{patched}", meta["versions"]
        made = (
            f"python {versions['python']}, torch {versions['torch']}, {meta['machine']['cpu']},"
            f" {meta['machine']['device']}"
        )
        found = [
            meta["job"].get("SLURM_JOB_ID", "none"),
            *(summary[key] for key in ("val_auc", "val_f2")),
        ]
        rows.append(
            [
                Path(run).name,
                code,
                e.digest(f"{run}/config.yaml"),
                made,
                *found,
                summary["weights_sha256"][:12],
            ]
        )
        files += [f"{run}/{name}" for name in ("config.yaml", "meta.json", "summary.json")]
    header = ("run", "commit", "config", "environment", "job", "AUC", "F2", "final weights")
    title = "The champion, epoch by epoch, one view, beside constant answers"
    panels = "epoch", figures.EPOCH_PANELS
    drawn = picture("champion", title, [epochs], figures.plot_columns, e.csv(epochs), *panels)
    listed = csv_table(e, f"{KEPT}/runs.csv")
    told = [
        Words(
            f"All {len(rows.rows)} runs that lay in runs/, with the SHA-256 of each summary.json:"
        )
        for rows in listed
    ]
    return table(header, rows, *files) + drawn + told + listed


def reproduce(e: Evidence) -> list:
    for run in finished(e):
        commit, data = (
            e.json(f"{run}/meta.json")["commit"] or "COMMIT",
            read_run(e.root / run)["data_dir"],
        )
        steps = (
            f"cp {run}/config.yaml again.yaml\ngit checkout {commit}\nmake setup\npython prepare.py"
            f" verify {data}\n"
        )
        steps += "python train.py --config again.yaml"
        digest = e.json(f"{run}/summary.json")["weights_sha256"]
        told = f"It is reproduced if the new summary.json has the `weights_sha256` `{digest}`."
        return [
            Code(steps, f"{run}, once more"),
            Words(told, sources=(f"{run}/summary.json", f"{run}/config.yaml")),
        ]
    return []


def new_data(_e: Evidence) -> list:
    return [
        Code(
            f"python inference.py --ckpt {CHAMPION} patches/ --out predictions.csv",
            "a checkpoint on new patches",
        )
    ]


def space(e: Evidence) -> list:
    if not (plan := e.json(PLAN)):
        return []
    rows = [
        [key, kind, plain(bounds)]
        for key, spec in plan["ranges"].items()
        for kind, bounds in spec.items()
    ]
    words = (
        f"{len(plan['trials'])} trials of a {plan['design']} design, rungs of"
        f" {plain(plan['rungs'])} epochs, "
    )
    words += f"frozen beforehand with the SHA-256 `{plan['sha256'][:12]}`."
    return [Words(words, sources=(PLAN,)), *table(("parameter", "scale", "range"), rows, PLAN)]


def trials(e: Evidence) -> list:
    used = (PLAN, f"{SEARCH}/rung-1.json")
    plan, rung = map(e.json, used)
    if not rung:
        return []
    rows = []
    for trial, score in rung["scores_before"].items():
        is_promoted = plain(trial in rung["trials"])
        rows.append([trial, *plan["trials"][trial].values(), score, is_promoted])
    header = ("trial", *plan["ranges"], "AUC after the first rung", "promoted")
    drawn = handed_over(e, f"{SEARCH}/trials.png", "The search", *used)
    return drawn + table(header, rows, *used, full=PAGE)


def champion(e: Evidence) -> list:
    summary, name = e.json(f"{CHAMPION}/summary.json"), f"{MODEL}/predictions.csv"
    found = e.json(f"{SEARCH}/champion.json")
    keys = ("trial", "mean", "deviation", "low", "high", "num")
    rows = [[row[key] for key in keys] for row in found.get("finalists", [])]
    parts = (
        [Words(f"{found['note']}."), *table(keys, rows, f"{SEARCH}/champion.json")]
        if found
        else [missing(SWEEP)]
    )
    cells = (
        [
            [
                f"{CHAMPION}, uncalibrated, at 0.5",
                *(summary[f"val_{count}"] for count in ("tn", "fp", "fn", "tp")),
            ]
        ]
        if summary
        else []
    )
    header = (
        "checkpoint",
        "true negatives",
        "false positives",
        "false negatives",
        "true positives",
    )
    parts += table(header, cells, f"{CHAMPION}/summary.json")
    if rows := [row for row in e.csv(name) if row.get("label") and row["probability"]]:
        labels, probs = (
            figures.column(rows, "label").astype(int),
            figures.column(rows, "probability"),
        )
        at = e.json(f"{MODEL}/scores.json").get("checkpoint", {}).get("threshold", 0.5)
        title = (
            f"The champion on {len(rows):,} patches of validation, calibrated, at its threshold"
            f" {at:.3g}"
        )
        used = [name, *e.names(f"{MODEL}/scores.json")]
        parts += picture("decisions", title, used, figures.plot_decisions, labels, probs, at)
    return parts


def threshold(e: Evidence) -> list:
    rules, scores = f"{MODEL}/thresholds.csv", f"{MODEL}/scores.json"
    parts = csv_table(e, rules) + table(("score", "value"), [*flat(e.json(scores))], scores)
    title, used = "What thresholds mean, with 95% bands", (f"{MODEL}/curves.csv", rules, scores)
    parts += handed_over(e, f"{MODEL}/curves.png", title, *used)
    title = "Reliability; the area of a marker shows how many patches are in its bin"
    return parts + handed_over(e, f"{MODEL}/reliability.png", title, f"{MODEL}/reliability.csv")


def baselines(e: Evidence) -> list:
    name, summary = f"{CHAMPION}/summary.json", e.json(f"{CHAMPION}/summary.json")
    rows = [
        [title, summary[f"val_{key}"], summary[other]]
        for title, (key, other) in SHOWN_SCORES.items()
        if summary
    ]
    return table(("score on validation", "champion", "constant answer"), rows, name)


# 6: slices and errors


def errors(e: Evidence) -> list:
    name = f"{MODEL}/errors.csv"
    false_alarms, missed = (
        [row for row in e.csv(name) if row["label"] == label] for label in ("0", "1")
    )
    worst = sorted(false_alarms, key=lambda row: -float(row["probability"]))[:NUM_ERRORS]
    worst += sorted(missed, key=lambda row: float(row["probability"]))[:NUM_ERRORS]
    words = (
        f"{len(false_alarms):,} false positives and {len(missed):,} false negatives at the"
        " checkpoint's threshold; the most "
    )
    words += "certain of each:"
    shown = gallery(
        e, "errors", "False positives and false negatives", f"{MODEL} where the audit ran"
    )
    return [Words(words), *csv_table(e, name, worst), *shown] if worst else []


def slices(e: Evidence) -> list:
    name, scores = f"{MODEL}/slices.csv", f"{MODEL}/scores.json"
    title = (
        "Scores by slice, with 95% intervals, beside those of all patches (dotted); orange:"
        " confirmed to be worse, yellow: worse on one half"
    )
    return csv_table(e, name) + handed_over(e, f"{MODEL}/slices.png", title, name, scores)


def global_score(e: Evidence) -> list:
    name, scores = f"{MODEL}/slices.csv", f"{MODEL}/scores.json"
    overall = [[key, *row.values()] for key, row in e.json(scores).get("global", {}).items()]
    rows = sorted((row for row in e.csv(name) if row.get("auc")), key=lambda row: float(row["auc"]))
    ends = zip(("lowest AUC", "highest AUC"), (rows[:1], rows[-1:]), strict=True)
    extremes = csv_table(
        e, name, [{"slice with the": end} | row for end, picked in ends for row in picked]
    )
    return (
        table(("score on the half that judges slices", "value", "95% from", "to"), overall, scores)
        + extremes
    )


# 7: collaboration


def consolidation(e: Evidence) -> list:
    merges = git(
        "log", "--merges", "-8", "--abbrev=10", "--format=%h%x09%s", e.commit, "--"
    ).splitlines()
    return table(("merge", "subject"), [line.split("\t", 1) for line in merges])


def conflict(e: Evidence) -> list:
    name = f"{KEPT}/git/conflict.diff"
    if not e.has(name):
        return [Words("No merge in this repository's history was stopped by a conflict.")]
    text = (e.root / name).read_text(encoding="utf-8").rstrip()
    told = (
        "The newest one, as `git show --remerge-diff` tells it: what the two sides had made of one"
        " place, and what was kept."
    )
    return [Words(told, sources=(name,)), Code(text, text.partition("\n")[0])]


def graph(e: Evidence) -> list:
    log = git("log", "--graph", f"-{NUM_COMMITS}", "--format=%x09%h  %s", e.commit, "--").rstrip()
    if not log:
        return []
    title = f"The last {NUM_COMMITS} commits up to {e.commit[:10]}"
    drawn = picture("commits", title, [], drawings.plot_commits, log.splitlines())
    return [*drawn, Code(log.replace("\t", " "), "git log --graph")]


# 8: benchmark


def bench_rows(e: Evidence, **wanted) -> tuple[list[dict], list[str]]:
    """Rows of the benchmarks, one for each partition, that time a model, those with these values
    alone; and their files.
    """
    names = e.names(BENCHMARKS)
    rows = [
        row for name in names for row in e.json(name)["rows"] if row["what"] in ("infer", "train")
    ]
    return [
        row for row in rows if all(row.get(key) == value for key, value in wanted.items())
    ], names


def precision(e: Evidence) -> list:
    timed, names = bench_rows(e)
    keys, rates = ("partition", "what", "model", "batch_size"), {}
    for row in timed:
        if row.get("images_per_s") and row["case"] in ("default", "fp32", "bf16", "fp16"):
            rates.setdefault(tuple(row[key] for key in keys), {})[row["precision"]] = row[
                "images_per_s"
            ]
    rows = [
        [*key, *(pair.get(name) for name in PRECISIONS)]
        for key, pair in rates.items()
        if len(pair) > 1
    ]
    return table(
        (*(key.replace("_", " ") for key in keys), *(f"{name}, images/s" for name in PRECISIONS)),
        rows,
        *names,
    )


def batch_one(e: Evidence) -> list:
    keys = (
        "what",
        "case",
        "model",
        "precision",
        "partition",
        "node_type",
        "images_per_s",
        "low",
        "high",
        "job_id",
        "status",
    )
    rows, names = bench_rows(e, batch_size=1)
    return table(keys, [[row.get(key) for key in keys] for row in rows], *names)


def scaling(e: Evidence) -> list:
    cells, keys = [], ("batch_size", "images_per_s", "low", "high", "factor")
    timed, names = bench_rows(e, case="default")
    for row in timed:
        name = f"{row['partition']}: {row['what']}, {row['model']}, {row['precision']}"
        memory_mb = row["memory_bytes"] / 1e6 if row.get("memory_bytes") else None
        rates = [row.get(key) for key in keys]
        cells.append([name, *rates, memory_mb, row.get("gpu"), row.get("status")])
    header = (
        "series",
        "batch size",
        "images/s",
        "95% from",
        "to",
        "factor",
        "memory, MB",
        "GPU",
        "status",
    )
    parts = table(header, cells, *names)
    for name in names:
        parts += bench_picture(e, name, "scaling", "Throughput over batch size")
    return parts


def bench_picture(e: Evidence, name: str, drawn: str, title: str) -> list[Drawing]:
    """A figure beside a benchmark.json, its partition in the title."""
    partition = e.json(name)["rows"][0]["partition"]
    png = f"{name.rpartition('/')[0]}/{drawn}.png"
    return handed_over(e, png, f"{title}, {partition}", name)


def bottleneck(e: Evidence) -> list:
    parts = []
    for name in e.names(BENCHMARKS):
        verdict = e.json(name).get("verdict") or {}
        rows = [pair for pair in flat(verdict) if not pair[0].endswith("sentence")]
        partition = e.json(name)["rows"][0]["partition"]
        parts += [
            Words(f"{partition}: {verdict.get('sentence', '')}", sources=(name,)),
            *table(("what", "value"), rows, name),
            *bench_picture(
                e, name, "stages", "Stages of a batch, and what the machine would allow"
            ),
        ]
    name = "assets/benchmark_proof.json"
    proved = [
        [row["what"], f"{row['held']} of {row['total']}", row["commit"]]
        for row in e.json(name).values()
    ]
    return parts + table(("proof of the benchmark", "held", "commit"), proved, name)


# 9: documentation, and the checklist


def readme(e: Evidence) -> list:
    lines = enumerate(read_code(e.commit, "README.md").splitlines(), 1)
    rows = [
        [line.removeprefix("## "), f"README.md:{number}"]
        for number, line in lines
        if line.startswith("## ")
    ]
    return table(("section", f"where, at {e.commit[:10]}"), rows)


def stick(e: Evidence) -> list:
    rows = [
        [row["what"], plain(row["held"]), row["measured"]]
        for row in e.json("assets/handover.json").get("rows", [])
    ]
    told = "`make handover DEST=DIR` writes the folder; `python audit.py handover DIR` checks it."
    return [Words(told), *table(("what", "held", "measured"), rows, "assets/handover.json")]


def checklist(e: Evidence) -> list:
    names = [
        name
        for name in git("ls-tree", "-r", "--name-only", e.commit).splitlines()
        if name.endswith(".sh")
    ]
    best = f"{CHAMPION}/best.pt"
    rows = [
        ["repository linked", e.said.get("repository")],
        ["best checkpoint in the repository", f"{best}, SHA-256 {e.digest(best)}"],
        ["inference.py works", f"python inference.py --ckpt {CHAMPION} patches/"],
        [
            "every Slurm script in the repository",
            ", ".join(name for name in names if "SLURM" in read_code(e.commit, name)),
        ],
        ["every image by a relative path under assets/", f"{DRAWN}/, {KEPT}/"],
        ["names and ids on the first page", f"{len(e.said.get('members') or [])} listed"],
    ]
    return [
        *table(("item", "evidence"), rows),
        Words("`make checklist` judges each item, and runs inference.py to do so."),
    ]


def front_page(e: Evidence) -> list[tuple[str, list]]:
    """Group, repository, base set-up and members, where the checklist looks for them: [(title,
    parts)].
    """
    about = [
        f"Group: {e.said.get('group')}",
        f"Repository: {e.said.get('repository')}",
        (e.said.get("remark") or "").strip(),
    ]
    about.append(
        "Made by `report.py journal` from the files that it names, at commit"
        f" `{e.commit or 'none'}`."
    )
    base = [missing("train SEED=1")]
    if runs := finished(e):
        config = read_run(e.root / runs[-1])
        base = table(
            ("parameter", "value"),
            [[key, plain(config.get(key))] for key in SETUP],
            f"{runs[-1]}/config.yaml",
        )
    members = [
        Words(f"{member['name']} ({member['id']})") for member in e.said.get("members") or []
    ]
    return [
        ("", [Words(text) for text in about if text]),
        ("Base set-up chosen", base),
        ("Members", members),
    ]


ANSWERS = {
    key: globals()[key]
    for questions in read_questions().values()
    for key, *_ in questions
    if key in globals()
}
