"""How cost grows: with connections, with models and clients, and with those who wait in weir's queue."""

import contextlib
import http.client
import re
import subprocess
import sys
import time

from .figures import Figure
from .peers import Scene
from .processes import end, resident_bytes

CONNECTIONS = [1, 8, 64, 512, 5000]
NAMES = [1, 10, 100, 1000]
WAITERS = [0, 1000, 10_000, 100_000]


def figures():
    found = {f"connections-{count}": Figure(connections(count)) for count in CONNECTIONS}
    for count in NAMES:
        what = f"{count:,} model{'s' if count > 1 else ''}"
        found[f"models-{count}"] = of_weir(names(what, "--models", count), Scene(models=count))
    unknown = names(f"{NAMES[-1]:,} models, not configured", "--models", NAMES[-1])
    found["models-unknown"] = of_weir(unknown, Scene())
    for count in NAMES:
        what = f"{count:,} client{'s' if count > 1 else ''}"
        found[f"clients-{count}"] = of_weir(names(what, "--clients", count), Scene(clients=count))
    for count in WAITERS:
        found[f"queue-{count}"] = of_weir(waiting(count), Scene())
    return found


def of_weir(load, scene):
    return Figure(load, process_of_its_own=True, scene=scene, only="weir")


def connections(count):
    return lambda probe: probe.closed_loop(count)


def names(what, option, count):
    """64 connections, whose requests name so many models or clients in turn."""

    def load(probe):
        found = probe.requests(what, "--seconds", probe.seconds, option, count)
        return found and found | {f"memory, {what} (MiB)": resident_bytes(probe.process.pid) / 2**20}

    return load


def waiting(count):
    """So many wait for a slot of one model, while 64 connections ask for another one."""

    def load(probe):
        before = resident_bytes(probe.process.pid)
        with waiters(probe, count) if count else contextlib.nullcontext(0) as reached:
            if reached is None:
                return None
            what = f"{reached:,} waiting"
            grown = resident_bytes(probe.process.pid) - before
            found = {f"memory of one who waits, {what} (KiB)": grown / reached / 1024 if reached else None}
            found |= probe.requests(what, "--seconds", probe.seconds) or {}
            found |= probe.requests(f"{what}, 500/s", "--rate", 500, "--seconds", probe.seconds) or {}
            return found

    return load


@contextlib.contextmanager
def waiters(probe, count, most_seconds=120):
    """Once all wait: how many do. Nothing, if they do not come to wait."""
    command = [probe.load, "waiters", "--to", probe.address, "--model", "slow", "--waiters", str(count)]
    process = subprocess.Popen([*command, "--seconds", str(most_seconds)], stdout=subprocess.DEVNULL)
    try:
        yield wait_until_waiting(probe.admin, count, process)
    finally:
        end(process)


def wait_until_waiting(admin, count, process, patience=60):
    deadline = time.monotonic() + patience
    while (now := number_waiting(admin)) < count:
        if time.monotonic() > deadline or process.poll() is not None:
            print(f"compare: of {count:,} that should wait only {now:,} do", file=sys.stderr)
            return now or None
        time.sleep(0.05)
    return now


def number_waiting(admin):
    connection = http.client.HTTPConnection(admin, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return round(sum(float(value) for value in re.findall(r"^weir_waiting(?:\{.*\})? (\S+)$", text, re.MULTILINE)))
