"""What the page of a model audit draws, and the names of its rows: curves, thresholds, calibration
and slices.
"""

from lib.figures import COLOURS, MARKS, add_legend, column, draw_constants, new_figure

# of the scores that slices are judged by
TITLES = {"auc": "AUC", "recall": "recall", "specificity": "specificity"}
LARGEST_MARKER = 200  # its area, in square points
BEST = "F2-optimal"
STORED = "stored in the checkpoint"
ALWAYS = "always positive"
# of the rules for a threshold, on curves
MARKED = (BEST, "recall at least 0.95", "a miss costs 10 false alarms", STORED, "one half")


def slice_name(row: dict) -> str:
    """A slice in words: its feature and which part of it."""
    return f"{row['feature'].replace('_', ' ')} {row['slice']}"


def threshold_name(row: dict) -> str:
    return f"{row['rule']} ({row['threshold']:.3g})"


def score_colour(row: dict, name: str) -> str:
    """Of slices, orange: confirmed to be worse by a score; yellow: found to be, on one half."""
    if name in row.get("confirmed", ""):
        return COLOURS[1]
    return COLOURS[4] if name in row.get("found", "") else COLOURS[0]


def plot_scores(rows: list[dict], labels: list[str], names, overall: dict):
    """A panel for each of some scores, with a line for each row: its value and interval, beside the
    `value` over all patches at the stored threshold (dotted).
    """
    num = len(rows)
    places = range(num)
    figure, panels = new_figure(len(names), width=4.4, height=1.2 + 0.2 * num)
    for axes, name in zip(panels, names, strict=True):
        colours = [score_colour(row, name) for row in rows]
        lows = column(rows, f"{name}_low")
        highs = column(rows, f"{name}_high")
        axes.hlines(places, lows, highs, colors=colours)
        axes.scatter(column(rows, name), places, s=16, c=colours)
        value = overall[name]["value"]
        axes.axvline(value, color="black", linestyle=":")
        axes.set_title(f"{TITLES[name]} ({value:.3f})")
        axes.set_yticks(places, [""] * num)
        axes.set_ylim(num - 0.4, -0.6)  # the first on top
    panels[0].set_yticks(places, labels, fontsize=8)
    return figure


def plot_slices(tables: dict, scores: dict):
    """Scores of slices."""
    rows = tables["slices"]
    labels = [slice_name(row) for row in rows]
    return plot_scores(rows, labels, TITLES, scores["global"])


def plot_prices(tables: dict, scores: dict):
    """Recall and specificity at each threshold."""
    rows = [row for row in tables["thresholds"] if not row["rule"].startswith("always")]
    labels = [threshold_name(row) for row in rows]
    return plot_scores(rows, labels, ("recall", "specificity"), scores["global"])


def plot_curves(tables: dict, scores: dict):
    """ROC and precision-recall with their 95% bands, and where thresholds lie."""
    figure, (roc, pr) = new_figure(2, 5.2, 4.2)
    draw_constants(roc, pr, scores["constant_baselines"]["prevalence"])
    marked = [row for row in tables["thresholds"] if row["rule"] in MARKED]
    recall = column(marked, "recall")
    precision = column(marked, "precision")
    false_alarms = 1 - column(marked, "specificity")
    for axes, curve, x, y in (
        (roc, "roc", false_alarms, recall),
        (pr, "pr", recall, precision),
    ):
        rows = [row for row in tables["curves"] if row["curve"] == curve]
        places = column(rows, "x")
        lows = column(rows, "low")
        highs = column(rows, "high")
        axes.fill_between(places, lows, highs, alpha=0.25, linewidth=0)
        axes.plot(places, column(rows, "y"))
        for number, row in enumerate(marked):
            style = {"color": COLOURS[number + 1], "markersize": 6}
            style["label"] = threshold_name(row)
            axes.plot(x[number], y[number], MARKS[number], **style)
    pr.legend(loc="lower left")
    return figure


def plot_reliability(tables: dict, _scores: dict):
    """Share of positives, with its 95% interval, against the mean probability of each bin, for each
    of the series that `probabilities` names; the constant one is left out. The area of a marker is
    proportional to the number of patches in its bin.
    """
    figure, (axes,) = new_figure(1, 6, 4.5)
    axes.plot((0, 1), (0, 1), color="black", linestyle=":")
    bins = tables["reliability"]
    names = list(dict.fromkeys(row["probabilities"] for row in bins))
    for name, colour, mark in zip(names[:-1], COLOURS, MARKS, strict=False):
        rows = [row for row in bins if row["probabilities"] == name]
        mean = column(rows, "mean_probability")
        share = column(rows, "positive_share")
        lows = column(rows, "positive_share_low")
        highs = column(rows, "positive_share_high")
        axes.vlines(mean, lows, highs, color=colour)
        axes.plot(mean, share, color=colour)
        num = column(rows, "num")
        area = LARGEST_MARKER * num / num.max()
        axes.scatter(mean, share, area, color=colour, marker=mark, alpha=0.7, label=name)
    axes.set(xlabel="mean probability of a bin", ylabel="share of positives")
    add_legend(figure, axes)
    return figure
