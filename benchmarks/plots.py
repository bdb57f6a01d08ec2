"""PNG plots of results: share of the floor by number of tokens, or by case, ours and the peers beside us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import GRAPH_TOKENS, OURS, arms, best_rows, common_arms, label

MIN_SWEEP = 3  # values of M that make a curve

# A panel: its title, and arm -> [(x, share of floor)]
Panel = tuple[str, dict[str, list[tuple[Any, float]]]]


def panels(document: dict[str, Any]) -> tuple[bool, list[Panel]]:
    """What to draw: whether x is M, and one panel per shape and dtype (a sweep) or per dtype and pass (by case)."""
    rows = best_rows(document)
    drawn = common_arms(document, rows)
    rows = [row for row in rows if "error" not in row and row["arm"] in drawn]
    sweep = len({row["sizes"].get("M") for row in rows} - {None}) >= MIN_SWEEP
    found: dict[str, dict[str, list[tuple[Any, float]]]] = {}
    for row in rows:
        sizes = row["sizes"]
        title = f"{row['dtype']}, {row['pass']}"
        if sweep:
            title = f"{sizes.get('K')}->{sizes.get('N')}, {title}"
        x = sizes["M"] if sweep else row["case"]
        found.setdefault(title, {}).setdefault(label(document, row["arm"]), []).append((x, row["share_of_floor"]))
    return sweep, list(found.items())


def plot(document: dict[str, Any], path: Path) -> Path:
    """Writes the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweep, found = panels(document)
    longest = max(len(points) for _, curves in found for points in curves.values())
    width = 5.2 if sweep else max(5.2, 0.9 * longest)
    columns = max(1, min(len(found), int(16 / width)))
    lines = -(-len(found) // columns)
    size = (width * columns, 4.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.remove()
    names = [label(document, arm) for arm in arms(document)]
    colors = {name: "black" if name == OURS else f"C{i}" for i, name in enumerate(names)}
    for axis, (title, curves) in zip(axes.flat, found):
        (_draw_sweep if sweep else _draw_cases)(axis, curves, colors)
        axis.axhline(1.0, color="grey", linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the floor (1 = the limit)")
    shown = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels())}
    columns = min(len(shown), int(size[0] / 2))
    figure.legend(shown.values(), shown.keys(), fontsize=8, ncols=columns, loc="outside lower center", frameon=False)
    title = f"{document['op']}, {document['device']['name']}, {_modes(document)}commit {document['commit'][:12]}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _modes(document: dict[str, Any]) -> str:
    rows = [row for row in best_rows(document) if row["arm"] == OURS]
    modes = {row["mode"] for row in rows}
    if modes == {"graph", "eager"}:
        return f"CUDA graph up to {GRAPH_TOKENS} tokens, eager above, "
    return "".join(f"{mode}, " for mode in sorted(modes))


def _draw_sweep(axis: Any, curves: dict[str, list[tuple[Any, float]]], colors: dict[str, str]) -> None:
    for name, points in curves.items():
        points = sorted(points)
        axis.plot(*zip(*points), marker="o", markersize=3, label=name, color=colors[name])
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("M (tokens)")


def _draw_cases(axis: Any, curves: dict[str, list[tuple[Any, float]]], colors: dict[str, str]) -> None:
    cases = list(dict.fromkeys(x for points in curves.values() for x, _ in points))
    width = 0.8 / len(curves)
    for i, (name, points) in enumerate(curves.items()):
        positions = [cases.index(x) + (i - (len(curves) - 1) / 2) * width for x, _ in points]
        axis.bar(positions, [share for _, share in points], width, label=name, color=colors[name])
    slanted = {"rotation": 20, "ha": "right"} if sum(len(case) for case in cases) > 36 else {}
    axis.set_xticks(range(len(cases)), cases, fontsize=8, **slanted)
