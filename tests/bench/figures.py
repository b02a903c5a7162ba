"""Figures of a benchmark: medians, and one line per figure with its target."""

import statistics
import sys


def note(text):
    """Says what is going on, on standard error: standard output has the figures only."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def spread(samples, unit):
    """The median of samples with the least and the most."""
    return f"{statistics.median(samples):.1f} {unit} ({min(samples):.1f} to {max(samples):.1f}, {len(samples)} runs)"


def report(name, value, unit, target=None, detail=""):
    """Prints a figure; target is the most that it should be."""
    verdict = ""
    if target is not None:
        verdict = f"target {target:g}: {'met' if value <= target else 'MISSED'}"
    print(f"{name:<58} {value:>9.2f} {unit:<6} {verdict:<22} {detail}".rstrip(), flush=True)


def report_ratio(name, ours, theirs, target, unit="ms"):
    """Prints the ratio of two medians that were measured by turns."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    report(name, ratio, "", target, f"ours {spread(ours, unit)}, theirs {spread(theirs, unit)}")
