"""What a request and an event take, counted by a tool that slows the proxy down but is not disturbed by other work.

A tool is put in front of the proxy's command, twice: for few requests, and for many. The difference over the difference
in requests is what one takes; start and end fall out of it. Everything runs on one core, with one worker.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .figures import BODY_BYTES, Probe
from .peers import Scene
from .processes import started

ONE_WORKER = Scene(threads=1)
# Valgrind makes a proxy some fifty times slower.
PATIENCE = 60

REQUESTS = (500, 2500)
CONNECTIONS = 16
EVENTS = (10, 60)
STREAMS = 10
BODIES = (10, 40)


def requests(probe, count):
    return probe.run("requests", "--connections", CONNECTIONS, "--warm-up", 0, "--requests", count)


def events(probe, count):
    return probe.run("events", "--streams", STREAMS, "--interval-ms", 40, "--events", count)


def bodies(probe, count):
    """Of 1 MiB."""
    load = ["requests", "--connections", 2, "--warm-up", 0, "--requests", count]
    return probe.run(*load, "--body-bytes", BODY_BYTES)


# By the figure's name: the load, the few and the many, and how many of what is counted each of them brings.
LOADS = {
    "request": (requests, REQUESTS, 1),
    "event": (events, EVENTS, STREAMS),
    "body": (bodies, BODIES, 1),
}


class Instructions:
    """Those in user space, of the whole process, by callgrind."""

    needs = "valgrind"

    def command(self, output):
        return ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={output}"]

    def read(self, output):
        """By name; the file's last total is the whole."""
        totals = [line.split()[1] for line in output.read_text().splitlines() if line.startswith("totals:")]
        return {"instructions": int(totals[-1])} if totals else None


class SystemCalls:
    """How often each is made, by strace. It runs behind the proxy, whose process is thus still ours to end."""

    needs = "strace"

    def command(self, output):
        return ["strace", "-D", "-f", "-qq", "-c", "-o", output]

    def read(self, output):
        lines = [line.split() for line in output.read_text().splitlines()]
        calls = {line[-1]: int(line[3]) for line in lines if len(line) >= 5 and line[3].isdigit()}
        if "total" not in calls:
            return None
        return {"system calls": calls.pop("total")} | calls


def measure(name, command, tool, loads, load, upstream, settings):
    """What each kind of load takes of what the tool counts, in one round of one peer."""
    figures = {}
    for what, (run, (few, many), units) in loads.items():

        def counted(number):
            ask = lambda address: run(Probe(load, settings, address), number)
            return count(command, tool, upstream, ask, settings.keep and settings.keep / f"{name}-{what}-{number}")

        start, whole = counted(few), counted(many)
        if start and whole:
            each = {call: (whole[call] - start.get(call, 0)) / ((many - few) * units) for call in whole}
            figures |= {f"{call} per {what}": value for call, value in each.items() if value >= 0.01}
    return figures


def count(command, tool, upstream, ask, kept):
    """What the tool has counted from the proxy's start to its end, or nothing where something went wrong."""
    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "counted"

        def traced(place):
            return ["taskset", "-c", core, *tool.command(output), *command(place)]

        with started(traced, upstream, ONE_WORKER, PATIENCE) as (place, _, _):
            report = ask(place.listen)
        counts = wait_for(tool, output) if report else None
        if counts and kept:
            shutil.copy(output, kept)
        return counts


def wait_for(tool, output, patience=20):
    """A tool may end a little after what it counts for."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if output.exists() and (found := tool.read(output)):
            return found
        time.sleep(0.05)
    print(f"compare: {tool.needs} has left no counts", file=sys.stderr)
    return None


def order(figure):
    """All that a request takes, then all that an event takes."""
    return list(LOADS).index(figure.split(" per ")[1])


def must_be_installed(tool):
    if not shutil.which(tool.needs):
        sys.exit(f"compare: {tool.needs} is not installed")
