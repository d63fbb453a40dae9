"""Records as tables, and the project's targets held against them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import targets

COLUMNS = ("variant", "time", "spread", "ratio", "rate", "extra memory", "error against float64", "work")


def seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def mebibytes(value: int) -> str:
    return f"{value / 2**20:.1f} MiB"


def error_text(row: dict[str, Any]) -> str:
    text = ", ".join(f"{name} {value:.1e}" for name, value in row.get("errors", {}).items())
    return text if row.get("agrees", True) else f"DISAGREES: {text}"


def rate_text(row: dict[str, Any]) -> str:
    text = f"{row['rate']:.4g} {row['rate_unit']}"
    text += f", {row['model_tflops']:.3g} model TFLOP/s" if "model_tflops" in row else ""
    return text + (f", MFU {row['mfu']:.1%}" if "mfu" in row else "")


def cells(row: dict[str, Any]) -> list[str]:
    for reason in ("unavailable", "failed"):
        if reason in row:
            return [row["name"], reason, "", "", "", "", "", row[reason]]
    timed = "median_s" in row
    memory = mebibytes(row["extra_bytes"]) if "extra_bytes" in row else row.get("memory_failed", "")
    return [
        row["name"],
        seconds(row["median_s"]) if timed else "",
        f"{row['spread']:.0%}" if timed else "",
        f"{row['ratio']:.2f}" if timed else "",
        rate_text(row) if timed else "",
        memory,
        error_text(row),
        row["work"],
    ]


def title(case: dict[str, Any]) -> str:
    shape = " x ".join(map(str, case["shape"]))
    rounds = max((len(row.get("samples_s", ())) for row in case["variants"]), default=0)
    text = f"{case['stem']}: {case['case']}, {shape}, {case['dtype']}, {case['device']}"
    baseline = next((row["baseline"] for row in case["variants"] if row.get("baseline")), None)
    return text + (f"; median of {rounds} rounds, ratio to: {baseline}" if rounds else "")


def caption(case: dict[str, Any]) -> str:
    formulas = {row["rate_formula"] for row in case["variants"] if "rate_formula" in row}
    return "rate of: " + ", ".join(sorted(formulas)) if formulas else ""


def print_markdown(heading: str, columns: tuple[str, ...], rows: list[list[str]], note: str = "") -> None:
    lines = [list(columns), ["---"] * len(columns), *rows]
    print(f"\n{heading}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}")


def print_table(heading: str, columns: tuple[str, ...], rows: list[list[str]], note: str = "") -> None:
    """A rich table; plain columns where rich is not installed (a bare GPU machine)."""
    if importlib.util.find_spec("rich") is None:
        print(f"\n{heading}\n" + "\n".join("  ".join(row) for row in [list(columns), *rows]) + f"\n{note}")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(heading), caption=escape(note), title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in (0, len(columns) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    wide = None if sys.stdout.isatty() else 220
    Console(width=wide).print(table)
    sys.stdout.flush()


def print_case(case: dict[str, Any], show: Callable = print_table) -> None:
    show(title(case), COLUMNS, [cells(row) for row in case["variants"]], caption(case))
    missing = sorted({row["pip"] for row in case["variants"] if row.get("unavailable", "").startswith("not installed")})
    if missing:
        print(f"peers not installed: pip install --no-deps {' '.join(missing)}")


def print_environment(environment: dict[str, Any]) -> None:
    device, versions = environment["device"], environment["versions"]
    known = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    threads = ""
    if "threads" in device:
        threads = f", {device['threads']} threads on {device['cores']} cores, load {device['load_average']:.1f}"
    modified = " (modified)" if environment["modified"] else ""
    print(f"{device['name']}{threads}; {known}; commit {environment['commit'][:12]}{modified}; {environment['date']}")
    print_caution(environment)


def print_caution(environment: dict[str, Any]) -> None:
    """Say so where a CPU's figures cannot be trusted: every parallel region then waits for a thread without a core."""
    device = environment["device"]
    if device["type"] == "cpu" and device["threads"] > device["cores"]:
        print(
            f"CAUTION: {device['threads']} threads on {device['cores']} cores: variants of many small parallel regions "
            "wait at every barrier. Set OMP_NUM_THREADS, or measure on a quiet machine."
        )


def print_targets(record: dict[str, Any], show: Callable = print_table) -> None:
    rows = [
        [t.text, f"{t.value:.3g}", f"{'<=' if t.at_most else '>='} {t.limit:g}", "met" if t.met else "MISSED"]
        for t in targets.evaluate(record)
    ]
    if rows:
        show("targets", ("target", "measured", "limit", ""), rows)


def main(arguments: list[str]) -> None:
    """python -m bench.report [--markdown] FILE ...: print records again."""
    show = print_markdown if "--markdown" in arguments else print_table
    for path in arguments:
        if path == "--markdown":
            continue
        record = json.loads(Path(path).read_text())
        print_environment(record["environment"])
        for case in record["cases"]:
            print_case(case, show)
        print_targets(record, show)


if __name__ == "__main__":
    main(sys.argv[1:])
