"""A benchmark as files: rows.csv, benchmark.json with the verdict, tables in benchmark.md, and two
plots.
"""

from pathlib import Path

import numpy as np

from lib.benchmark.rounds import COLUMNS, JOB
from lib.benchmark.verdict import GROUPS
from lib.blocks import Figure, Heading, Table, Words, table_of, to_markdown
from lib.figures import COLOURS, MARKS, add_legend, column, figure_png, new_figure
from lib.files import atomic_write, write_csv, write_json

METHOD = (
    "A rate is the geometric mean of {repeats} repeats of {seconds} s, with Student's 95% interval"
    " over the repeats. All cases take turns; the cases of a model share a process, a new one each"
    " round. Batches count from when two windows agree to 5%; p50, p90 and p99 are of all of them."
    " Stages are those of plain steps; on a GPU the step of training is one captured CUDA graph."
    " Energy is that of the processor packages, or of the GPU; it stays empty where it is not"
    " measurable: RAPL that only root may read, a MIG slice."
)
NO_GPU = (
    "Of a GPU nothing is measured: there is none here. `make bench PARTITION=gpu_course DATA=DIR`"
    " measures all of this on one."
)
RATE = ("images_per_s", "low", "high")
END = ("share_of_peak", "status", "note")
AT_ONE = ("what", "model", "partition", "node_type", "job_id", *RATE, "status")
PERCENTILES = ("p50_s", "p90_s", "p99_s")
PER_BATCH = ("memory_bytes", "energy_j_per_image")
SCALING = ("batch_size", *RATE, "factor", *PERCENTILES, *PER_BATCH, *END)
VARIANTS = ("case", "batch_size", "precision", "cache", *RATE, "factor", "first_batch_s", *END)
LIMITS = ("case", "batch_size", "precision", "cache", *RATE, "p50_s", "flops_per_s", *END)
TABLES = {
    "loader": ("Loader (factor: against torchvision's best)", VARIANTS),
    "infer": ("Inference, variants (factor: against the default)", VARIANTS),
    "train": ("Training, variants (factor: against the default)", VARIANTS),
    "stage": ("Stages of training", LIMITS),
    "limit": ("What the machine does at most", LIMITS),
}


def write_benchmark(out: Path, result: dict) -> None:
    """Write all of them into a folder."""
    rows, verdict = result["rows"], result["verdict"]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "rows.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    write_json(out / "benchmark.json", result)
    facts = {"data": result["data"]} | {name: rows[0][name] for name in JOB} | result["machine"]
    blocks = [Heading("Benchmark", 1), *map(Words, verdict["sentences"])]
    blocks += [Table(("what", "value"), list(facts.items())), Words(METHOD.format(**result))]
    if rows[0]["gpu"] == "none":
        blocks.append(Words(NO_GPU))
    for (title, columns), chosen in sort_into_tables(rows).items():
        blocks += [Heading(title), table_of(chosen, columns)]
    for name, figure in draw(rows, verdict).items():
        png = figure_png(figure)
        with atomic_write(out / f"{name}.png") as file:
            file.write(png)
        blocks.append(Figure(name.capitalize(), png, f"{name}.png"))
    with atomic_write(out / "benchmark.md", "w") as file:
        file.write(to_markdown(blocks) + "\n")


def sort_into_tables(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows of each table, by its title and columns."""
    scaling = [row for row in rows if row["case"] == "default"]
    at_one = [row for row in scaling if row["batch_size"] == 1]
    tables = {("Throughput at batch 1", AT_ONE): at_one} if at_one else {}
    for row in scaling:
        title = f"Scaling: {row['what']}, {row['model']} (factor: against the smallest batch)"
        tables.setdefault((title, SCALING), []).append(row)
    for row in rows:
        if row["case"] != "default":
            tables.setdefault(TABLES[row["what"]], []).append(row)
    return tables


def draw(rows: list[dict], verdict: dict) -> dict:
    """Figures by name: throughput over batch size, and the stages of a batch."""
    series, figures = {}, {}
    for row in rows:
        if row["case"] == "default" and row["images_per_s"]:
            series.setdefault(f"{row['what']}, {row['model']}", []).append(row)
    if series:
        figures["scaling"] = plot_scaling(series)
    if "later_epochs" in verdict:
        epoch = verdict["later_epochs"]
        figures["stages"], (axes,) = new_figure(1, 5.0, 3.8)
        for stage, seconds in epoch["stage_s"].items():
            is_bottleneck = GROUPS[stage] == epoch["bottleneck"]
            axes.barh(stage, 1e3 * seconds, color=COLOURS[is_bottleneck])
        axes.set(xlabel="ms a batch, from memory")
    return figures


def plot_scaling(series: dict[str, list[dict]]):
    """Throughput against batch size with its interval, a line for each series of rows."""
    figure, (axes,) = new_figure(1, 7.5, 4.2)
    ticks = set()
    for (name, rows), mark in zip(series.items(), MARKS, strict=False):
        rows = sorted(rows, key=lambda row: row["batch_size"])
        sizes, rates = column(rows, "batch_size"), column(rows, "images_per_s")
        errors = [rates - column(rows, "low"), column(rows, "high") - rates]
        # a rate that was measured once has no interval
        axes.errorbar(sizes, rates, np.nan_to_num(errors), marker=mark, label=name)
        ticks.update(sizes)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second")
    axes.set_xticks(sorted(ticks), [f"{size:g}" for size in sorted(ticks)])
    axes.minorticks_off()
    add_legend(figure, axes)
    return figure
