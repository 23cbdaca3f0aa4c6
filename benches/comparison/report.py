"""Markdown tables of what was measured, ready to be pasted."""

import json
import os
import re
import statistics
from pathlib import Path


def print_report(rounds, ratios, order=None):
    """What a proxy costs, with ratios; then what the clients saw, the direct way included.

    In the order of measuring, or in another one.
    """
    # Whoever has the most of them has them in order.
    fullest = sorted(rounds.values(), key=lambda found: -sum(map(len, found)))
    figures = list(dict.fromkeys(figure for found in fullest for figures in found for figure in figures))
    raw = [figure for figure in figures if figure.startswith(("latency", "requests per second"))]
    proxies = {peer: found for peer, found in rounds.items() if peer != "direct"}
    ratios = [(ours, theirs) for ours, theirs in ratios if ours in proxies and theirs in proxies]
    costs = [figure for figure in figures if figure not in raw]
    if order:
        costs.sort(key=order)
    if proxies and costs:
        print_table("median (least to greatest)", proxies, costs, ratios)
    if raw:
        print_table("what the clients saw", rounds, raw, [])


def print_growth(rounds, ratios):
    """The connections for each peer, as above; for the rest, which only weir has, a row for each step."""
    with_connections = {peer: [only(figures, True) for figures in found] for peer, found in rounds.items()}
    print_report(with_connections, ratios)
    print_steps([only(figures, False) for figures in rounds.get("weir", [])])


def only(figures, of_connections):
    return {figure: value for figure, value in figures.items() if ("connection" in figure) == of_connections}


def print_steps(rounds):
    steps = {}
    for figure in dict.fromkeys(figure for figures in rounds for figure in figures):
        measure, step = split(figure)
        steps.setdefault(step, {})[measure] = [figures[figure] for figures in rounds if figure in figures]
    measures = list(dict.fromkeys(measure for found in steps.values() for measure in found))
    if measures:
        print_heads(["weir", *measures])
    for step, found in steps.items():
        print_row([step, *(spread(found.get(measure, [])) for measure in measures)])
    print()


def split(figure):
    """The measure with its unit, and where it was taken: "CPU (µs)" and "10 models" of "CPU, 10 models (µs)"."""
    measure, step, unit = re.fullmatch(r"(.+?), (.+?)( \([^)]*\))?", figure).groups()
    return measure + (unit or ""), step


def print_table(title, rounds, figures, ratios):
    heads = [title, *rounds, *(f"{ours} / {theirs}" for ours, theirs in ratios)]
    print_heads(heads)
    for figure in figures:
        samples = {peer: values(rounds, peer, figure) for peer in rounds}
        compared = [ratio(samples[ours], samples[theirs]) for ours, theirs in ratios]
        print_row([figure, *map(spread, samples.values()), *compared])
    print()


def print_heads(heads):
    print_row(heads)
    print("|---" * len(heads) + "|")


def print_row(cells):
    print("| " + " | ".join(cells) + " |")


def values(rounds, peer, figure):
    return [figures.get(figure) for figures in rounds[peer]]


def spread(samples):
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        return "–"
    middle = number(statistics.median(samples))
    return middle if len(samples) == 1 else f"{middle} ({number(min(samples))} to {number(max(samples))})"


def ratio(ours, theirs):
    """Those within each round. Where a difference drowned in noise in some of them, that of the medians, if any."""
    pairs = [(our, their) for our, their in zip(ours, theirs) if our is not None and their is not None]
    if not pairs:
        return "–"
    if min(map(min, pairs)) > 0:
        return spread([our / their for our, their in pairs])
    our, their = map(statistics.median, zip(*pairs))
    return f"{number(our / their)} of the medians" if min(our, their) > 0 else "–"


def number(value):
    """Three digits, or all of those before the point."""
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{decimals}f}"


def print_sizes(binaries):
    sizes = {peer: f"{os.path.getsize(os.path.realpath(path)) / 2**20:.1f}" for peer, path in binaries.items()}
    if sizes:
        print_heads(["", *sizes])
        print_row(["binary (MiB)", *sizes.values()])


def write_json(path, rounds):
    Path(path).write_text(json.dumps(rounds, ensure_ascii=False, indent=1) + "\n")
