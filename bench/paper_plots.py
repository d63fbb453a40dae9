"""The plots of `python -m bench.paper`: training curves and held-out results, PNG files (matplotlib, extra "bench")."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.paper_stats import SPLITS, START, TITLES, Records, last_step

CURVES = {
    "reward/pass_rate": "pass rate of the rollouts",
    "diversity/distinct_4": "distinct-4 of a prompt's rollouts",
    "sampling/entropy": "entropy of the sampled tokens (nats)",
    "scope/near_miss_rate": "near-misses among the failures",
}
MAIN = ("grpo", "scope", "replace", "prm_reward", "sft")
COLORS = {arm: f"C{i}" for i, arm in enumerate((*MAIN, START))}
WINDOW = 5  # steps of the running mean


def draw(found: Records, folder: Path) -> list[Path]:
    """The files written. ImportError naming the extra where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ImportError("the plots need matplotlib: pip install 'scope-fast[bench]'") from error
    matplotlib.use("Agg")  # no display is needed, nor looked for
    import matplotlib.pyplot as plt

    arms = [arm for arm in MAIN if arm in found]
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.2 * len(CURVES), 3.6), constrained_layout=True)
    for axis, (name, label) in zip(axes, CURVES.items(), strict=True):
        for arm in arms:
            lines = [_smooth(record["metrics"][name]) for record in found[arm].values() if name in record["metrics"]]
            if lines:
                low, high = np.min(lines, axis=0), np.max(lines, axis=0)
                axis.plot(np.mean(lines, axis=0), label=arm, color=COLORS[arm])
                axis.fill_between(range(len(low)), low, high, alpha=0.15, color=COLORS[arm])
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    curves = folder / "paper_curves.png"
    figure.savefig(curves, dpi=120)

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), constrained_layout=True)
    for axis, (split, tasks) in zip(axes, SPLITS.items(), strict=True):
        for arm in (START, *arms):
            if arm in found:
                axis.plot(*_pass_at_k(found[arm], tasks), marker="o", label=arm, color=COLORS[arm])
        axis.set_title(f"pass@k, held-out problems {TITLES[split]}", fontsize=10)
        axis.set_xlabel("k")
    axes[0].legend(fontsize=8)
    results = folder / "paper_pass_at_k.png"
    figure.savefig(results, dpi=120)
    plt.close("all")
    return [curves, results]


def _smooth(values: list[float | None]) -> np.ndarray:
    """A running mean over what is defined."""
    column = np.asarray([np.nan if value is None else value for value in values], dtype=float)
    windows = [column[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(column))]
    return np.asarray([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])


def _pass_at_k(records: dict[int, dict], tasks: tuple[str, ...]) -> tuple[list[int], list[float]]:
    metrics = [r["evaluations"][last_step(r)][task]["metrics"] for r in records.values() for task in tasks]
    ks = sorted(int(name.removeprefix("pass@")) for name in metrics[0] if name.startswith("pass@"))
    return ks, [float(np.mean([m[f"pass@{k}"]["value"] for m in metrics])) for k in ks]
