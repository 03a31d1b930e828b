"""A benchmark as files: rows.csv, benchmark.json with the verdict, tables in benchmark.md, and two
plots.
"""

from pathlib import Path

import numpy as np

from lib.benchmark.rounds import COLUMNS, JOB, PERCENTILES
from lib.benchmark.verdict import GROUPS
from lib.blocks import Figure, Heading, Table, Words, table_of, to_markdown
from lib.figures import COLOURS, MARKS, add_legend, column, figure_png, new_figure
from lib.files import atomic_write, write_csv, write_json

METHOD = (
    "A rate is the geometric mean of {repeats} repeats of {seconds} s, with Student's 95% interval"
    " over the repeats. All cases take turns; the cases of a model share a process, a new one each"
    " round. A warm-up does not count. p50, p90 and p99 are of all batches."
    " Stages are those of plain steps; on a GPU the step of training is one captured CUDA graph."
    " Energy is that of the processor packages, or of the GPU; it stays empty where it is not"
    " measurable: RAPL that only root may read, a MIG slice."
)
RATE = ("images_per_s", "low", "high", "factor")
END = ("share_of_peak", "status", "note")
SCALING = ("batch_size", *RATE, *PERCENTILES, "memory_bytes", "energy_j_per_image", *END)
OTHERS = ("case", "batch_size", "precision", "cache", *RATE, "p50_s", "flops_per_s", *END)
TITLES = {
    "loader": "Loader (factor: against torchvision's best)",
    "infer": "Inference, variants (factor: against the default)",
    "train": "Training, variants (factor: against the default)",
    "stage": "Stages of training",
    "limit": "What the machine does at most",
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
    tables, series, figures = {}, {}, {}
    for row in rows:
        title, columns = TITLES[row["what"]], OTHERS
        if row["case"] == "default":
            name = f"{row['what']}, {row['model']}"
            title, columns = f"Scaling: {name} (factor: against the smallest batch)", SCALING
            series.setdefault(name, []).append(row)
        tables.setdefault((title, columns), []).append(row)
    for (title, columns), chosen in tables.items():
        blocks += [Heading(title), table_of(chosen, columns)]
    if series:
        figures["scaling"] = plot_scaling(series)
    if "later_epochs" in verdict:
        figures["stages"] = plot_stages(verdict["later_epochs"])
    for name, figure in figures.items():
        png = figure_png(figure)
        with atomic_write(out / f"{name}.png") as file:
            file.write(png)
        blocks.append(Figure(name.capitalize(), png, f"{name}.png"))
    with atomic_write(out / "benchmark.md", "w") as file:
        file.write(to_markdown(blocks) + "\n")


def plot_scaling(series: dict[str, list[dict]]):
    """Throughput against batch size with its interval, a line for each series of rows."""
    figure, (axes,) = new_figure(1, 7.5, 4.2)
    for (name, rows), mark in zip(series.items(), MARKS, strict=False):
        sizes, rates = column(rows, "batch_size"), column(rows, "images_per_s")
        errors = [rates - column(rows, "low"), column(rows, "high") - rates]
        # a rate that was measured once has no interval
        axes.errorbar(sizes, rates, np.nan_to_num(errors), marker=mark, label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])  # all series have the same
    axes.minorticks_off()
    add_legend(figure, axes)
    return figure


def plot_stages(epoch: dict):
    """The stages of a batch as bars, the bottleneck in another colour."""
    figure, (axes,) = new_figure(1, 5.0, 3.8)
    for stage, seconds in epoch["stage_s"].items():
        is_bottleneck = GROUPS[stage] == epoch["bottleneck"]
        axes.barh(stage, 1e3 * seconds, color=COLOURS[is_bottleneck])
    axes.set(xlabel="ms a batch, from memory")
    return figure
