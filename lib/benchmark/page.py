"""A benchmark as files: rows.csv, benchmark.json with the verdict, samples.json.gz, tables in
benchmark.md, and two plots.
"""

import gzip
import json
from pathlib import Path

import numpy as np

from lib.benchmark.timing import COLUMNS
from lib.benchmark.verdict import GROUPS
from lib.blocks import Figure, Heading, Table, Words, table_of, to_markdown
from lib.command import without_nan
from lib.files import atomic_write, write_csv, write_json

NO_GPU = (
    "not measured: there is no GPU here. `make bench PARTITION=gpu_course DATA=DIR` measures all of"
    " this on one."
)
# a figure of a row, and its title, its factor and its format in a table
FIGURES = {
    "p50_s": ("p50 ms", 1e3, ""),
    "p90_s": ("p90 ms", 1e3, ""),
    "p99_s": ("p99 ms", 1e3, ""),
    "factor": ("factor", 1, ".2f"),
    "memory_bytes": ("memory MB", 1e-6, ""),
    "flops_per_s": ("TFLOP/s", 1e-12, ""),
    "first_batch_s": ("first batch s", 1, ""),
}
SCALING = ("batch_size", "images_per_s", "factor", "p50_s", "p90_s", "p99_s", "memory_bytes")


def write_benchmark(out: Path, result: dict, samples: list[dict]) -> None:
    """Write all of them into a folder; `samples` say of each case the seconds of every batch."""
    rows, machine = result["rows"], result["machine"]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "rows.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    write_json(out / "benchmark.json", result)
    with (
        atomic_write(out / "samples.json.gz") as file,
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
    ):
        packed.write(json.dumps(without_nan(samples)).encode())
    gpu = f"{describe_gpu(machine)}: the tables above." if "gpu" in machine else NO_GPU
    blocks = [*fact_blocks(result), *table_blocks(rows), Heading("GPU"), Words(gpu)]
    for name, png in draw(rows, result["verdict"]).items():
        with atomic_write(out / f"{name}.png") as file:
            file.write(png)
        blocks.append(Figure(name.capitalize(), png, f"{name}.png"))
    with atomic_write(out / "benchmark.md", "w") as file:
        file.write(to_markdown(blocks) + "\n")


def fact_blocks(result: dict) -> list:
    """When and where, and the verdict."""
    machine, first = result["machine"], result["rows"][0]
    memory_mb = show(machine["cgroup_memory_bytes"], 1e-6) or "all"
    limits = f"cgroup: {machine['cgroup_cpus'] or 'all'} cores, {memory_mb} MB"
    facts = {
        "made": f"{first['date']}, commit {first['commit']}; {first['versions']}",
        "machine": (
            f"{machine['cpu']}, {machine['num_cores']} cores ({limits}), {machine['system']}"
        ),
        "partition": (
            f"{first['partition']}, node type {first['node_type']}, job {first['job_id']}"
        ),
        "GPU": describe_gpu(machine),
        "data": (
            f"{result['data']}; {result['repeats']} repeats of {result['seconds']:g} s, each in a"
            " process of its own"
        ),
    }
    return [
        Heading("Benchmark", 1),
        Table(("what", "value"), list(facts.items())),
        Heading("Verdict"),
        Words(result["verdict"]["sentence"]),
    ]


def table_blocks(rows: list[dict]) -> list:
    """Titles and tables: batch 1, scaling of each model, the loader, variants, stages and
    limits.
    """
    blocks = []
    timed = [row for row in rows if row["what"] in ("infer", "train")]
    scaling = [row for row in timed if row["case"] == "default"]
    at_one = [row for row in scaling if row["batch_size"] == 1]
    if at_one:
        names = ("what", "model", "partition", "node_type", "images_per_s", "job_id")
        blocks += [Heading("Throughput at batch 1"), case_table(at_one, names)]
    for what, model in dict.fromkeys((row["what"], row["model"]) for row in scaling):
        series = [row for row in scaling if (row["what"], row["model"]) == (what, model)]
        title = (
            f"Scaling: {what}, {model}, {series[0]['precision']}, {series[0]['threads']} threads"
        )
        blocks += [Heading(title), case_table(series, SCALING, "of matrix product")]
    for what, title in (
        ("loader", "Loader"),
        ("infer", "Inference, variants"),
        ("train", "Training, variants"),
    ):
        variants = [row for row in rows if row["what"] == what and row["case"] != "default"]
        if variants:
            blocks += [Heading(title), variant_table(rows, variants, what)]
    stages = [row for row in rows if row["what"] in ("stage", "limit")]
    if stages:
        names = ("what", "case", "batch_size", "precision", "images_per_s", "p50_s", "flops_per_s")
        blocks.append(Heading("Stages, and what the machine can do at most"))
        blocks.append(case_table(stages, names))
    return blocks


def case_table(rows: list[dict], names, peak: str = "") -> Table:
    """A table of these columns of cases, each rate with its interval, and how each ended; `peak`
    names what `share_of_peak` is a share of.
    """
    return table_of([case_cells(row, names, peak) for row in rows])


def case_cells(row: dict, names, peak: str = "") -> dict[str, object]:
    """The cells of a case by their titles."""
    cells = {}
    for name in names:
        if name in FIGURES:
            title, factor, form = FIGURES[name]
            cells[title] = show(row[name], factor, form)
        elif name == "images_per_s":
            cells["images/s"] = show(row[name])
            cells["95% interval"] = interval(row)
        else:
            title = "page cache" if name == "cache" else name.replace("_", " ")
            cells[title] = row[name]
    if peak:
        cells[peak] = show(row["share_of_peak"], form=".1%")
    cells["status"] = f"{row['status']}: {row['note']}" if row["note"] else row["status"]
    return cells


def variant_table(rows: list[dict], variants: list[dict], what: str) -> Table:
    """The loader's cases against torchvision's best, variants of a model against its default at the
    same batch size.
    """
    against, peak = "x default", "of matrix product"
    if what == "loader":
        against, peak = "x torchvision", "of memory copy"
    names = ("case", "batch_size", "precision", "cache", "threads", "images_per_s", "first_batch_s")
    cells = []
    for row in variants:
        best = best_other(rows, row)
        ratio = None
        if best and row["images_per_s"]:
            ratio = row["images_per_s"] / best["images_per_s"]
        cells.append({**case_cells(row, names, peak), against: show(ratio, form=",.2f")})
    return table_of(cells)


def best_other(rows: list[dict], row: dict) -> dict | None:
    """The case that a variant is compared with: of those alike the most often repeated, then the
    fastest.
    """
    alike = []
    for other in rows:
        is_same = all(other[name] == row[name] for name in ("what", "model", "batch_size"))
        is_reference = other["case"] == "default"
        if row["what"] == "loader":
            is_torchvision = other["case"].startswith("torchvision")
            is_reference = is_torchvision and other["cache"] == row["cache"]
        if is_same and is_reference and other["images_per_s"]:
            alike.append(other)
    return max(alike, key=lambda other: (other["num_repeats"], other["images_per_s"]), default=None)


def describe_gpu(machine: dict) -> str:
    """The GPU with its memory, driver and whether it is a slice; or `none`."""
    if "gpu" not in machine:
        return "none"
    kind = "a MIG slice" if machine["mig"] else "whole"
    memory_mib = machine["gpu_memory_bytes"] / 2**20
    size = f"{memory_mib:,.0f} MiB, {machine['num_multiprocessors']} multiprocessors"
    versions = f"driver {machine['driver']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}"
    return f"{machine['gpu']} ({kind}, {size}, {versions})"


def show(value, factor: float = 1.0, form: str = "") -> str:
    """A number in four digits, or as `form` says; nothing where there is none."""
    if value is None:
        return ""
    value *= factor
    if form:
        return format(value, form)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval(row: dict) -> str:
    """From where to where the rate of a case lies."""
    if row["low"] and row["images_per_s"]:
        return f"{show(row['low'])} to {show(row['high'])}"
    return ""


def draw(rows: list[dict], verdict: dict) -> dict[str, bytes]:
    """PNGs by name: throughput over batch size, and the stages of a batch beside what the machine
    would allow.
    """
    from lib.figures import figure_png

    points, pictures = {}, {}
    for row in rows:
        rate = row["images_per_s"]
        if row["what"] in ("infer", "train") and row["case"] == "default" and rate:
            name = f"{row['what']}, {row['model']}, {row['precision']}"
            spot = (row["batch_size"], rate, row["low"] or rate, row["high"] or rate)
            points.setdefault(name, []).append(spot)
    if points:
        pictures["scaling"] = figure_png(plot_scaling(points))
    if "later_epochs" in verdict:
        pictures["stages"] = figure_png(plot_stages(verdict))
    return pictures


def plot_scaling(series: dict[str, list[tuple[float, float, float, float]]]):
    """Throughput against batch size, a line for each series: (batch size, images per second, low,
    high).
    """
    from lib.figures import MARKS, add_legend, new_figure

    figure, (axes,) = new_figure(1, 7.5, 4.2)
    sizes = set()
    for number, (name, points) in enumerate(series.items()):
        size, rate, low, high = np.array(sorted(points)).T
        sizes.update(size)
        mark = MARKS[number % len(MARKS)]
        axes.errorbar(size, rate, [rate - low, high - rate], marker=mark, label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second")
    axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
    axes.minorticks_off()
    add_legend(figure, axes)
    return figure


def plot_stages(verdict: dict):
    """Milliseconds of each stage of a batch, in the first epoch and in later ones; the bottleneck's
    are orange.
    """
    from lib.figures import COLOURS, new_figure

    names = [name for name in ("first_epoch", "later_epochs") if name in verdict]
    figure, panels = new_figure(len(names), 5.0, 3.8)
    for axes, name in zip(panels, names, strict=True):
        epoch = verdict[name]
        stages = [stage for group in GROUPS.values() for stage in group]
        bars = {stage: epoch["stage_s"][stage] for stage in stages if stage in epoch["stage_s"]}
        if epoch["overlapped_s"]:
            bars["all, overlapped"] = epoch["overlapped_s"]
        slowest = GROUPS[epoch["bottleneck"]]
        colours = [COLOURS[1] if stage in slowest else COLOURS[0] for stage in bars]
        axes.barh(list(bars), [1e3 * seconds for seconds in bars.values()], color=colours)
        axes.invert_yaxis()
        if epoch["limit_s"]:
            style = {"color": "black", "linestyle": ":", "label": f"limit: {epoch['limit']}"}
            axes.axvline(epoch["limit_s"] * 1e3, **style)
            axes.legend(loc="upper right")
        axes.set(xlabel="ms a batch", title=f"{name.replace('_', ' ')}: {epoch['bottleneck']}")
    return figure
