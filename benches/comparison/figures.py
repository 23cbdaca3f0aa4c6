"""What is measured: each figure is a load that the clients put on one address, and what comes of it by name."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Callable

from .peers import Scene
from .processes import resident_bytes, started

BODY_BYTES = 1 << 20
# How fast streams are opened where memory is measured, which is a matter of backlogs, and where time is.
OPENED_PER_SECOND = 2000
BEGUN_PER_SECOND = 1000


class Probe:
    """The clients, aimed at one address; each kind of load returns its figures by name."""

    def __init__(self, load, settings, address, process=None, admin=None):
        self.load, self.seconds, self.address = load, settings.seconds, address
        self.process, self.admin = process, admin
        self.pid = ["--pid", str(process.pid)] if process else []

    def run(self, *arguments):
        command = [self.load, *map(str, arguments), "--to", self.address, *self.pid]
        try:
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=120)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as failure:
            print(f"compare: no figure: {failure}", file=sys.stderr)
            return None
        report = json.loads(output.stdout)
        if report["errors"] or report.get("events_missing"):
            print(f"compare: no figure, for errors: {' '.join(command)}: {report}", file=sys.stderr)
            return None
        return report

    def requests(self, what, *arguments):
        """Under these names; a load with errors has no figures."""
        report = self.run("requests", *arguments)
        return report and {
            f"CPU per request, {what} (µs)": report["cpu_us_per_request"],
            f"requests per second, {what}": report["requests_per_second"],
            f"latency p50, {what} (µs)": report["latency_us"]["p50"],
            f"latency p99, {what} (µs)": report["latency_us"]["p99"],
        }

    def closed_loop(self, connections):
        what = f"{connections:,} connection{'s' if connections > 1 else ''}"
        return self.requests(what, "--connections", connections, "--seconds", self.seconds)

    def open_loop(self, rate):
        return self.requests(f"{rate:,}/s", "--rate", rate, "--seconds", self.seconds)

    def bodies(self):
        loop = ["--connections", 4, "--seconds", self.seconds]
        return self.requests("1 MiB body", *loop, "--body-bytes", BODY_BYTES)

    def events(self, streams):
        """5,000 events a second, however many streams bring them, for as long as all are open."""
        interval, opening = streams // 5, streams * 1000 // BEGUN_PER_SECOND
        events = round((opening + self.seconds * 1000) / interval)
        timing = ["--opening-ms", opening, "--interval-ms", interval, "--events", events]
        report = self.run("events", "--streams", streams, *timing)
        return report and {
            f"CPU per event, {streams:,} streams (µs)": report["cpu_us_per_event"],
            f"latency p50 of the first event, {streams:,} streams (µs)": report["first_event_us"]["p50"],
            f"latency p99 of the first event, {streams:,} streams (µs)": report["first_event_us"]["p99"],
        }

    def open_streams(self, streams):
        """The second and last event of each comes when the last stream has long been open."""
        opening = streams * 1000 // OPENED_PER_SECOND
        timing = ["--opening-ms", opening, "--interval-ms", opening + 1500, "--events", 2]
        report = self.run("events", "--streams", streams, *timing)
        if not report or report["resident_bytes_per_stream"] is None:
            return None
        return {f"memory per open stream, {streams:,} streams (KiB)": report["resident_bytes_per_stream"] / 1024}


@dataclass(frozen=True)
class Figure:
    load: Callable[[Probe], dict]
    # What the allocator kept of earlier load would hide what streams take.
    process_of_its_own: bool = False
    scene: Scene = Scene()
    only: str = ""


FIGURES = {
    "requests": Figure(lambda probe: probe.closed_loop(64)),
    "requests-4": Figure(lambda probe: probe.closed_loop(4)),
    "requests-1": Figure(lambda probe: probe.closed_loop(1)),
    "open-500": Figure(lambda probe: probe.open_loop(500)),
    "open-2000": Figure(lambda probe: probe.open_loop(2000)),
    "events-100": Figure(lambda probe: probe.events(100)),
    "events-1000": Figure(lambda probe: probe.events(1000)),
    "body": Figure(lambda probe: probe.bodies()),
    "memory-2000": Figure(lambda probe: probe.open_streams(2000), process_of_its_own=True),
    "memory-5000": Figure(lambda probe: probe.open_streams(5000), process_of_its_own=True),
    "start": Figure(lambda probe: None, process_of_its_own=True, scene=Scene(connections=1024)),
}
LAYOUTS = ["requests", "requests-4", "requests-1", "events-100"]
ALL = [name for name in FIGURES if name not in ("requests-4", "requests-1")]


def measure(name, command, figures, load, upstream, settings):
    """One round of one peer, or of the upstream itself where there is no command."""
    figures = {key: figure for key, figure in figures.items() if figure.only in ("", name)}
    if command is None:
        probe = Probe(load, settings, upstream)
        return known(figure.load(probe) for figure in figures.values() if not figure.process_of_its_own)
    return known(
        found for group in groups(figures) for found in measure_group(group, command, load, upstream, settings)
    )


def groups(figures):
    """The figures that share a process."""
    alone = [[key] for key, figure in figures.items() if figure.process_of_its_own]
    shared = [key for key, figure in figures.items() if not figure.process_of_its_own]
    return [[(key, figures[key]) for key in keys] for keys in [shared, *alone] if keys]


def measure_group(group, command, load, upstream, settings):
    with started(command, upstream, group[0][1].scene) as (place, process, milliseconds):
        if group[0][0] == "start":
            idle = resident_bytes(process.pid) / 2**20
            yield {"start to first answer (ms)": milliseconds, "memory when idle (MiB)": idle}
        probe = Probe(load, settings, place.listen, process, place.admin)
        for _, figure in group:
            yield figure.load(probe)


def known(found):
    """All figures in one, without what could not be measured."""
    return {name: value for figures in found if figures for name, value in figures.items() if value is not None}


def add_differences(rounds):
    """What each peer adds to the latency of going direct, round by round."""
    for name in rounds:
        if name == "direct":
            continue
        for figures, direct in zip(rounds[name], rounds.get("direct", [])):
            figures |= {
                f"added {figure.removeprefix('latency ')}": figures[figure] - direct[figure]
                for figure in direct
                if figure.startswith("latency") and figure in figures and ("/s" in figure or "first event" in figure)
            }
