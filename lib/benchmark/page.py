"""A benchmark as files: rows.csv, benchmark.json with the verdict, samples.json.gz, tables in
benchmark.md, and two plots.
"""

import gzip
import json
from pathlib import Path

from lib.benchmark.timing import COLUMNS
from lib.benchmark.verdict import GROUPS
from lib.command import without_nan
from lib.files import atomic_write, write_csv, write_json

SCALING = (
    "batch size",
    "images/s",
    "95% interval",
    "factor",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "memory MB",
    "of matrix product",
)
NO_GPU = (
    "not measured: there is no GPU here. `make bench PARTITION=gpu_course DATA=DIR` measures all of"
    " this on one."
)


def write_benchmark(out: Path, result: dict, samples: list[dict]) -> None:
    """Write all of them into a folder; `samples` say of each case the seconds of every batch."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(
        out / "rows.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in result["rows"]]
    )
    write_json(out / "benchmark.json", result)
    with (
        atomic_write(out / "samples.json.gz") as file,
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
    ):
        packed.write(json.dumps(without_nan(samples)).encode())
    parts = [*describe(result), *tables(result["rows"])]
    parts += [
        "## GPU",
        (
            f"{describe_gpu(result['machine'])}: the tables above."
            if "gpu" in result["machine"]
            else NO_GPU
        ),
    ]
    for name, png in draw(result["rows"], result["verdict"]).items():
        with atomic_write(out / name) as file:
            file.write(png)
        parts.append(f"![{name.removesuffix('.png')}]({name})")
    with atomic_write(out / "benchmark.md", "w") as file:
        file.write("\n\n".join(parts) + "\n")


def describe(result: dict) -> list[str]:
    """When and where, and the verdict."""
    machine, first = result["machine"], result["rows"][0]
    limits = (
        f"cgroup: {machine['cgroup_cpus'] or 'all'} cores,"
        f" {show(machine['cgroup_memory_bytes'], 1e-6) or 'all'} MB"
    )
    facts = [
        f"{first['date']}, commit {first['commit']}; {first['versions']}",
        f"{machine['cpu']}, {machine['num_cores']} cores ({limits}), {machine['system']}",
        f"partition {first['partition']}, node type {first['node_type']}, job {first['job_id']}",
        f"GPU: {describe_gpu(machine)}",
        (
            f"data: {result['data']}; {result['repeats']} repeats of {result['seconds']:g} s, each"
            " in a process of its own"
        ),
    ]
    return [
        "# Benchmark",
        "\n".join(f"- {fact}" for fact in facts),
        "## Verdict",
        result["verdict"]["sentence"],
    ]


def tables(rows: list[dict]) -> list[str]:
    """Titles and tables: batch 1, scaling of each model, the loader, variants, stages and
    limits.
    """
    parts = []
    scaling = [
        row for row in rows if row["what"] in ("infer", "train") and row["case"] == "default"
    ]
    if at_one := [row for row in scaling if row["batch_size"] == 1]:
        header = (
            "what",
            "model",
            "partition",
            "node type",
            "images/s",
            "95% interval",
            "job id",
            "status",
        )
        names = ("what", "model", "partition", "node_type")
        cells = [
            [
                *map(row.get, names),
                show(row["images_per_s"]),
                interval(row),
                row["job_id"],
                status(row),
            ]
            for row in at_one
        ]
        parts += ["## Throughput at batch 1", table(header, cells)]
    for what, model in dict.fromkeys((row["what"], row["model"]) for row in scaling):
        series = [row for row in scaling if (row["what"], row["model"]) == (what, model)]
        title = (
            f"## Scaling: {what}, {model}, {series[0]['precision']}, {series[0]['threads']} threads"
        )
        cells = [[row["batch_size"], *speed(row), status(row)] for row in series]
        parts += [title, table((*SCALING, "status"), cells)]
    for what, title in (
        ("loader", "Loader"),
        ("infer", "Inference, variants"),
        ("train", "Training, variants"),
    ):
        if others := [row for row in rows if row["what"] == what and row["case"] != "default"]:
            parts += [f"## {title}", table_of_others(rows, others, what)]
    if stages := [row for row in rows if row["what"] in ("stage", "limit")]:
        header = (
            "what",
            "case",
            "batch size",
            "precision",
            "images/s",
            "95% interval",
            "ms a batch",
            "TFLOP/s",
            "status",
        )
        names, cells = ("what", "case", "batch_size", "precision"), []
        for row in stages:
            rates = (
                show(row["images_per_s"]),
                interval(row),
                show(row["p50_s"], 1e3),
                show(row["flops_per_s"], 1e-12),
            )
            cells.append([*map(row.get, names), *rates, status(row)])
        parts += ["## Stages, and what the machine can do at most", table(header, cells)]
    return parts


def describe_gpu(machine: dict) -> str:
    """The GPU with its memory, driver and whether it is a slice; or `none`."""
    if "gpu" not in machine:
        return "none"
    kind = "a MIG slice" if machine["mig"] else "whole"
    memory = (
        f"{machine['gpu_memory_bytes'] / 2**20:,.0f} MiB, {machine['num_multiprocessors']}"
        " multiprocessors"
    )
    return (
        f"{machine['gpu']} ({kind}, {memory}, driver {machine['driver']}, CUDA {machine['cuda']},"
        f" cuDNN {machine['cudnn']})"
    )


def show(value, factor: float = 1.0, form: str = "") -> str:
    """A number in four digits, or as `form` says; nothing where there is none."""
    if value is None:
        return ""
    value *= factor
    return (
        format(value, form) if form else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    )


def interval(row: dict) -> str:
    return (
        f"{show(row['low'])} to {show(row['high'])}" if row["low"] and row["images_per_s"] else ""
    )


def status(row: dict) -> str:
    return row["status"] + (f": {row['note']}" if row["note"] else "")


def speed(row: dict) -> list[str]:
    """The cells of a row of a scaling."""
    times = [show(row[name], 1e3) for name in ("p50_s", "p90_s", "p99_s")]
    ends = [show(row["memory_bytes"], 1e-6), show(row["share_of_peak"], form=".1%")]
    return [
        show(row["images_per_s"]),
        interval(row),
        show(row["factor"], form=".2f"),
        *times,
        *ends,
    ]


def table(header, cells) -> str:
    """A Markdown table; a bar in a text would end its cell."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in cells]
    return "\n".join(f"| {line} |" for line in lines)


def table_of_others(rows: list[dict], others: list[dict], what: str) -> str:
    """The loader's cases against torchvision's best, variants of a model against its default at the
    same batch size.
    """
    names, cells = ("case", "batch_size", "precision", "cache", "threads"), []
    for row in others:
        alike = [
            other
            for other in rows
            if other["batch_size"] == row["batch_size"] and other["images_per_s"]
        ]
        alike = [
            other for other in alike if other["what"] == what and other["model"] == row["model"]
        ]
        if what == "loader":
            alike = [
                other
                for other in alike
                if other["case"].startswith("torchvision") and other["cache"] == row["cache"]
            ]
        else:
            alike = [other for other in alike if other["case"] == "default"]
        best = max(
            alike, key=lambda other: (other["num_repeats"], other["images_per_s"]), default=None
        )
        ratio = row["images_per_s"] / best["images_per_s"] if best and row["images_per_s"] else None
        values = [
            show(row["images_per_s"]),
            interval(row),
            show(ratio, form=",.2f"),
            show(row["share_of_peak"], form=".1%"),
        ]
        cells.append(
            [*(row[name] for name in names), *values, show(row["first_batch_s"]), status(row)]
        )
    against, peak = (
        ("x torchvision", "of memory copy")
        if what == "loader"
        else ("x default", "of matrix product")
    )
    header = (
        "case",
        "batch size",
        "precision",
        "page cache",
        "threads",
        "images/s",
        "95% interval",
        against,
        peak,
    )
    return table((*header, "first batch s", "status"), cells)


def draw(rows: list[dict], verdict: dict) -> dict[str, bytes]:
    """PNGs by file name: throughput over batch size, and the stages of a batch beside what the
    machine would allow.
    """
    from lib.figures import COLOURS, figure_png, new_figure, plot_scaling

    points, pictures = {}, {}
    for row in rows:
        if (
            row["what"] in ("infer", "train")
            and row["case"] == "default"
            and (rate := row["images_per_s"])
        ):
            spot = [row["batch_size"], rate, row["low"] or rate, row["high"] or rate]
            points.setdefault(f"{row['what']}, {row['model']}, {row['precision']}", []).append(spot)
    if points:
        pictures["scaling.png"] = figure_png(plot_scaling(points))
    if "later_epochs" in verdict:
        epochs = [
            (name, verdict[name]) for name in ("first_epoch", "later_epochs") if name in verdict
        ]
        figure, panels = new_figure(len(epochs), 5.0, 3.8)
        for axes, (name, epoch) in zip(panels, epochs, strict=True):
            seconds = epoch["stage_s"]
            bars = {
                stage: seconds[stage] * 1e3
                for stages in GROUPS.values()
                for stage in stages
                if stage in seconds
            }
            if epoch["overlapped_s"]:
                bars["all, overlapped"] = epoch["overlapped_s"] * 1e3
            axes.barh(
                list(bars),
                list(bars.values()),
                color=[COLOURS[stage in GROUPS[epoch["bottleneck"]]] for stage in bars],
            )
            axes.invert_yaxis()
            if epoch["limit_s"]:
                axes.axvline(
                    epoch["limit_s"] * 1e3,
                    color="black",
                    linestyle=":",
                    label=f"limit: {epoch['limit']}",
                )
                axes.legend(loc="upper right")
            axes.set(xlabel="ms a batch", title=f"{name.replace('_', ' ')}: {epoch['bottleneck']}")
        pictures["stages.png"] = figure_png(figure)
    return pictures
