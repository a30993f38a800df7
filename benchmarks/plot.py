"""Draws what run.py and transformers.py measured: against the number of ranks, and against depth.

    python benchmarks/plot.py --mlp FILE ... --transformers FILE ... --out FOLDER

The files are those that `--json` wrote. Two figures: `ranks.png`, time and memory of a rank divided
by those of TP=1 (medians over rounds of the ratio within a round), and `depth.png`, memory of a
transformer's bound against its number of layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

RANKS = {"tp1": 1, "tp2": 2, "tp4": 4}
Series = dict[int, float]


def ratios_of_mlps(figures: dict, key: str) -> dict[str, Series]:
    """Model -> ranks -> median ratio to TP=1."""
    return {
        model: {
            ranks: statistics.median(r[mode][key] / r["tp1"][key] for r in rounds)
            for mode, ranks in RANKS.items() if mode in rounds[0]
        }
        for model, rounds in figures.items()
    }


def worst_of_transformers(figures: dict, key: str) -> dict[tuple[int, int], Series]:
    """(layers, tokens) -> ranks -> the worst rank's figure."""
    found = {}
    for name, modes in figures.items():
        layers, tokens = map(int, name.split("x"))
        found[layers, tokens] = {
            RANKS[mode]: max(rank[key] for rank in of_ranks)
            for mode, of_ranks in modes.items()
            if mode in RANKS and of_ranks and "failed" not in of_ranks[0]
        }
    return found


def draw_ranks(mlps: dict, transformers: dict, path: Path) -> None:
    """Time and memory against the number of ranks."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, key, title in zip(panels, ("seconds", "mib"), ("time", "memory"), strict=True):
        series = ratios_of_mlps(mlps, key)
        for (layers, tokens), of_ranks in worst_of_transformers(transformers, key).items():
            if 1 in of_ranks and len(of_ranks) > 1:
                name = f"{layers}-layer transformer, {tokens} tokens"
                series[name] = {p: value / of_ranks[1] for p, value in of_ranks.items()}
        for name, of_ranks in series.items():
            panel.plot(list(of_ranks), list(of_ranks.values()), marker="o", label=name)
        ideal = list(RANKS.values())
        panel.plot(ideal, [1 / p for p in ideal], color="grey", linestyle="--", label="1/p")
        panel.set(xscale="log", yscale="log", xlabel="ranks", ylabel=f"{title} of a rank / TP=1")
        panel.set_xticks(ideal, map(str, ideal), minor=False)
        panel.set_xticks([], minor=True)
        ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8) if t / 2 < panel.get_ylim()[1]]
        panel.set_yticks(ticks, map(str, ticks), minor=False)
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    figure.suptitle("CROWN bounds: time and memory against the number of ranks")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_depth(transformers: dict, path: Path) -> None:
    """Memory against the number of layers."""
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4.2), layout="constrained")
    found = worst_of_transformers(transformers, "mib")
    for tokens in sorted({tokens for _, tokens in found}):
        for ranks in RANKS.values():
            points = sorted((layers, series[ranks]) for (layers, t), series in found.items()
                            if t == tokens and ranks in series)
            if len(points) > 1:
                panel.plot(*zip(*points, strict=True), marker="o",
                           label=f"{tokens} tokens, TP={ranks}")
    panel.set(xlabel="layers", ylabel="MiB of a rank above the imports",
              title="Memory of a transformer's CROWN bound against its depth")
    panel.set_xticks(sorted({layers for layers, _ in found}))
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlp", type=Path, nargs="+", required=True,
                        help="what run.py --json wrote")
    parser.add_argument("--transformers", type=Path, nargs="+", required=True,
                        help="what transformers.py --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    mlps: dict = {}
    transformers: dict = {}
    for figures, paths in ((mlps, arguments.mlp), (transformers, arguments.transformers)):
        for path in paths:
            figures |= json.loads(path.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_ranks(mlps, transformers, arguments.out / "ranks.png")
    draw_depth(transformers, arguments.out / "depth.png")
    print(f"figures: {arguments.out / 'ranks.png'} {arguments.out / 'depth.png'}")


if __name__ == "__main__":
    main()
