"""The training of a sparse autoencoder as a table of its curve, and as a figure."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from transformer_lens_bd3lm.analysis.sae import SaeTraining
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    ORANGE,
    QUIET,
    WIDTH,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table

_COLUMNS = {
    "step": ("step", "{:,}"),
    "loss": ("loss", "{:.4f}"),
    "explained": ("explained variance", "{:.3f}"),
    "valid_explained": ("validation", "{:.3f}"),
    "l0": ("active", "{:.1f}"),
    "dead": ("dead", "{:.1%}"),
}


def sae_training_table(result: SaeTraining, n: int = 8) -> Table:
    """Lay out ``n`` points of the curve, evenly spaced, the last among them."""
    kept = {key: form for key, form in _COLUMNS.items() if key in result.reports[-1]}
    caption = (
        f"{count(result.rows['training'], 'row')} to train on; loss as a share of the variance, "
        "with the part that revives dead features"
    )
    table = new_table(_title(result), [head for head, _ in kept.values()], (), caption)
    points = len(result.reports)
    shown = {round((i + 1) * points / min(n, points)) - 1 for i in range(min(n, points))}
    for number in sorted(shown):
        report = result.reports[number]
        table.add_row(*(form.format(report[key]) for key, (_, form) in kept.items()))
    return table


def sae_training_figure(result: SaeTraining) -> Figure:
    """Draw loss, explained variance, active features and dead features over the steps."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [report["step"] for report in result.reports]

    def curve(key: str) -> list[float]:
        return [report[key] for report in result.reports]

    left.plot(steps, curve("loss"), color=QUIET, linewidth=1.2, label="loss (left)")
    left.set(ylabel="loss, share of the variance", ylim=(0, None))
    middle.plot(steps, curve("explained"), color=BLUE, linewidth=1.2, label="batches")
    if "valid_explained" in result.reports[-1]:
        middle.plot(steps, curve("valid_explained"), "--", color=ORANGE, linewidth=1.2,
                    label="validation rows")  # fmt: skip
    middle.set(ylabel="explained variance")
    right.plot(steps, curve("dead"), color=BLUE, linewidth=1.2)
    right.set(
        ylabel=f"dead of {result.settings['d_sae']:,} features",
        ylim=(0, max(0.05, *curve("dead")) * 1.05),
    )
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        plain(axes)
    legend_below(figure, middle, 3, further=left.get_lines())
    write_title(figure, f"{_title(result)}, {result.reports[-1]['l0']:.1f} active")
    return figure


def _title(result: SaeTraining) -> str:
    """Return what was trained."""
    settings = result.settings
    return f"{settings['d_sae']:,} features of {result.name}, k={settings['k']}"
