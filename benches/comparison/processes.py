"""Starting what is measured, and ending it. Everything listens on loopback."""

import contextlib
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = "127.0.0.1"


def build(*arguments):
    """Builds with cargo; returns the path of each executable by its target's name."""
    command = ["cargo", "build", "--release", "--message-format=json-render-diagnostics", *arguments]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    return {m["target"]["name"]: m["executable"] for m in messages if m.get("executable")}


def allow_many_connections():
    """For this process and those it starts. Returns how many files each may open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def free_address():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return f"{HOST}:{probe.getsockname()[1]}"


@contextlib.contextmanager
def started(command, upstream, scene, patience=10):
    """A peer between clients and the upstream: its place, its process, and the milliseconds to its first answer."""
    with tempfile.TemporaryDirectory() as directory:
        place = Place(upstream, Path(directory), scene)
        with running(command(place), place.listen, patience) as (process, milliseconds):
            yield place, process, milliseconds


class Place:
    """Where a peer listens and whom it asks, and a directory for what it needs."""

    def __init__(self, upstream, directory, scene):
        self.listen, self.admin, self.upstream = free_address(), free_address(), upstream
        self.directory, self.scene = directory, scene


@contextlib.contextmanager
def running(command, address, patience=10):
    """The process, from its first answer on, with the milliseconds that took; ended on leaving."""
    begun = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL)
    try:
        wait_for_answer(process, address, patience)
        yield process, (time.monotonic() - begun) * 1000
    finally:
        end(process)


def end(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_answer(process, address, patience):
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if answers(address):
                return
        if process.poll() is not None:
            sys.exit(f"compare: {process.args[0]} ended with status {process.returncode} before it answered")
        if time.monotonic() > deadline:
            sys.exit(f"compare: no answer from {process.args[0]} within {patience} s")
        time.sleep(0.0005)


def answers(address):
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        body = '{"model":"gpt-4.1-mini","messages":[{"role":"user","content":"Hello"}]}'
        headers = {"content-type": "application/json", "authorization": "Bearer sk-not-a-key"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        return connection.getresponse().status == 200
    finally:
        connection.close()


def resident_bytes(pid):
    """Of the process and its children. What nginx's processes share counts for each of them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = [line for each in [pid, *children] for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
