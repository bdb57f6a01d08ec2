"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkern.formats.atomic import atomic_group

_COLOUR, _REFERENCE = "#3b6ea8", "#9aa0a6"


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Quality, memory, speed and trainable share of each method as bars, full fine-tuning's in grey.

    Args:
        rows: of `peftkern.training.compare.table_row`, any order; drawn from top to bottom.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('peftkern compare plots with matplotlib; pip install "peftkern[cli]"') from error
    from peftkern.training.compare import NAMES

    panels = (
        ("quality\n% of full's held-out improvement", [100 * (row["quality"] or 0) for row in rows], "{:.0f}", False),
        ("training memory\nMB", [row["memory_bytes"] / 1e6 for row in rows], "{:.0f}", False),
        ("speed\ntokens/s relative to full", [row["relative_speed"] for row in rows], "{:.2f}", False),
        ("trainable parameters\n% of all, log scale", [row["trainable_percent"] for row in rows], "{:.2g}", True),
    )
    figure = Figure(figsize=(12, 0.45 * len(rows) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True)
    colours = [_REFERENCE if row["method"] == "full" else _COLOUR for row in rows]
    for axes, (title, values, form, log) in zip(all_axes, panels, strict=True):
        bars = axes.barh([NAMES[row["method"]] for row in rows], values, color=colours)
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if log:
            axes.set_xscale("log")
        axes.margins(x=0.2)
    all_axes[0].invert_yaxis()
    with atomic_group() as add:
        add(path, lambda name: figure.savefig(name, dpi=130, format="png"))
