"""Markdown tables of what was measured, ready to be pasted."""

import json
import os
import statistics
from pathlib import Path


def print_report(rounds, ratios, order=None):
    """What a proxy costs, with ratios; then what the clients saw, the direct way included. In the order of measuring, or
    another one."""
    figures = list(dict.fromkeys(figure for found in rounds.values() for figures in found for figure in figures))
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


def print_table(title, rounds, figures, ratios):
    heads = [title, *rounds, *(f"{ours} / {theirs}" for ours, theirs in ratios)]
    print_row(heads)
    print("|---" * len(heads) + "|")
    for figure in figures:
        samples = {peer: values(rounds, peer, figure) for peer in rounds}
        compared = [ratio(samples[ours], samples[theirs]) for ours, theirs in ratios]
        print_row([figure, *map(spread, samples.values()), *compared])
    print()


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
    """Those within each round. Where a difference drowned in noise in some of them, that of the medians, if it can be had."""
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
        print_row(["", *sizes])
        print("|---" * (len(sizes) + 1) + "|")
        print_row(["binary (MiB)", *sizes.values()])


def write_json(path, rounds):
    Path(path).write_text(json.dumps(rounds, ensure_ascii=False, indent=1) + "\n")
