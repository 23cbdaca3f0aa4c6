"""The real binary as a child process, and how to wait for what it does.

Nothing here sleeps in the hope that something has happened by then: every wait is for an event,
has a deadline, and says what did not come. Every process ended is one that was started here.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEIR = Path(os.environ.get("WEIR_BINARY", ROOT / "target" / "release" / "weir"))
DEADLINE = 20.0

# For `weir simulate`: a gateway that answers quickly, and what one does on a bad day: overload, refusals
# that say when to come back, broken connections.
QUICK = ("--first-token", "5ms", "--per-token", "1ms")
BAD_DAY = (
    *QUICK,
    "--seed",
    "7",
    "--fault-hint",
    "20ms",
    "--fault",
    "503=0.04",
    "--fault",
    "429-retry-after-ms=0.04",
    "--fault",
    "reset-before-answer=0.04",
)
# For `weir serve` before it: so many tries that a run of bad luck, which comes some day, is not a failed test.
PATIENT = """
[retry]
max_retries = 8
base_delay = "20ms"
budget = 1.0
"""


def wait_until(what: str, event: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """What `event` returns, as soon as that is true."""
    end = time.monotonic() + deadline
    while not (result := event()):
        assert time.monotonic() < end, f"waited {deadline:.0f} s in vain: {what}"
        time.sleep(0.01)
    return result


def get(url: str) -> tuple[int, str]:
    """Status and text; the status is 0 where nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.read().decode()
    except OSError:
        return 0, ""


class Process:
    """A child process whose output is read as it comes and shown when the test fails."""

    def __init__(
        self,
        *arguments: str | Path,
        good_ends: tuple[int, ...] = (0,),
        program: str | Path = WEIR,
        descriptors: Sequence[int] = (),
    ):
        assert Path(program).is_file(), f"{program} is missing: cargo build --release"
        self.name = f"{Path(program).name} {arguments[0]}"
        self.good_ends = good_ends
        self.log: list[str] = []
        self.child = subprocess.Popen(
            [program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            pass_fds=descriptors,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.log.append(line.rstrip("\n"))

    def has_ended(self) -> bool:
        return self.child.poll() is not None

    def wait_until(self, what: str, event: Callable[[], Any]) -> Any:
        def event_or_end() -> Any:
            if ended := self.has_ended():
                self.reader.join(DEADLINE)
            if result := event():
                return result
            assert not ended, f"{self.name} ended with {self.child.returncode}, before {what}:\n" + "\n".join(self.log)
            return None

        return wait_until(f"{self.name}: {what}", event_or_end)

    def end(self) -> None:
        if not self.has_ended():
            self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
            raise AssertionError(f"{self.name} does not end on SIGTERM") from None
        finally:
            self.reader.join(DEADLINE)
            print(f"--- {self.name}, status {self.child.returncode}", *self.log, sep="\n")
        assert self.child.returncode in self.good_ends, f"{self.name} ended with {self.child.returncode}"
        assert not any("panicked" in line for line in self.log), f"{self.name} panicked"


@dataclass
class Sample:
    name: str
    labels: dict[str, str]
    value: float


@dataclass
class Weir:
    """A running `weir serve`."""

    base_url: str
    admin_url: str
    process: Process

    @property
    def origin(self) -> str:
        return self.base_url.removesuffix("/v1")

    def metrics(self) -> str:
        status, text = get(f"{self.admin_url}/metrics")
        assert status == 200, f"/metrics: {status}\n{text}"
        return text

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of that name that carry these labels; 0 where there is none."""
        return sum(
            sample.value
            for sample in samples(self.metrics())
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_until_idle(self) -> None:
        """Until every slot is given back."""
        wait_until("weir_in_flight is 0", lambda: self.metric("weir_in_flight") == 0)


@dataclass
class Simulator:
    """A running `weir simulate`."""

    base_url: str
    process: Process

    def stats(self) -> dict[str, Any]:
        status, text = get(f"{self.base_url.removesuffix('/v1')}/_stats")
        assert status == 200, f"/_stats: {status}\n{text}"
        return json.loads(text)

    def wait_until_idle(self) -> None:
        wait_until("the simulator has nothing in flight", lambda: self.stats()["in_flight"] == 0)


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str
    process: Process

    def api(self, path: str, **parameters: str) -> Any:
        """What /api/v1/`path` answers."""
        status, text = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}")
        assert status == 200, f"{path} {parameters}: {status}\n{text}"
        return json.loads(text)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series, now."""
        data = self.api("query", query=expression)
        assert data["resultType"] == "vector", f"{expression} is a {data['resultType']}"
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]


def samples(exposition: str) -> Iterator[Sample]:
    for line in exposition.splitlines():
        if match := re.fullmatch(r"([a-z_:][a-z0-9_:]*)(?:\{(.*)\})? (\S+)", line, re.IGNORECASE):
            name, labels, value = match.groups()
            yield Sample(name, dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")), float(value))


@contextmanager
def running_weir(directory: Path, upstream: str, config: str = "") -> Iterator[Weir]:
    """`weir serve` in front of `upstream`, on ports the system chose, with `config` on top."""
    file = directory / "weir.toml"
    file.write_text(config_with(upstream, config), encoding="utf-8")
    process = Process("serve", "--config", file)
    try:
        address, admin = process.wait_until("it says where it listens", lambda: listening(process.log))
        weir = Weir(f"http://{address}/v1", f"http://{admin}", process)
        process.wait_until("/readyz", lambda: get(f"{weir.admin_url}/readyz")[0] == 200)
        yield weir
    finally:
        process.end()


def config_with(upstream: str, config: str) -> str:
    """Test settings first, then `config`, whose tables may add to them, or set one otherwise."""
    tables: dict[str, list[str]] = {
        "[server]": ['listen = "127.0.0.1:0"', 'admin_listen = "127.0.0.1:0"', 'drain = "1s"'],
        "[upstream]": [f'base_url = "{upstream}"'],
        "[log]": ['format = "json"'],
    }
    table = ""
    for line in filter(None, map(str.strip, config.splitlines())):
        if line.startswith("["):
            table = line
            tables.setdefault(table, [])
        else:
            key = line.partition("=")[0].strip()
            others = [other for other in tables[table] if other.partition("=")[0].strip() != key]
            tables[table] = [*others, line]
    return "\n".join("\n".join([table, *lines]) for table, lines in tables.items())


def listening(log: list[str]) -> tuple[str, str] | None:
    """The two addresses in the log line that says where weir listens."""
    for line in log:
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            fields = entry.get("fields", entry)
            if fields.get("message") == "listening":
                return host_and_port(fields["address"]), host_and_port(fields["admin"])
    return None


def host_and_port(address: Any) -> str:
    match = re.search(r"127\.0\.0\.1:\d+", str(address))
    assert match, f"no address in {address!r}"
    return match.group()


@contextmanager
def running_simulator(*arguments: str) -> Iterator[Simulator]:
    """`weir simulate` on a port the system chose."""
    process = Process("simulate", "--listen", "127.0.0.1:0", *arguments, good_ends=(0, -signal.SIGTERM))
    try:
        welcome = re.compile(r"http://127\.0\.0\.1:\d+/v1")
        address = process.wait_until("it says where it listens", lambda: welcome.search("\n".join(process.log)))
        yield Simulator(address.group(), process)
    finally:
        process.end()


@contextmanager
def running_prometheus(directory: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    """Prometheus with this configuration (JSON is YAML too), on a port the system chose."""
    file = directory / "prometheus.yml"
    file.write_text(json.dumps(config), encoding="utf-8")
    process = Process(
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        "--web.listen-address=127.0.0.1:0",
        program=tool("prometheus"),
    )
    try:
        says = re.compile(r'msg="Listening on" address=(127\.0\.0\.1:\d+)')
        address = process.wait_until("it says where it listens", lambda: says.search("\n".join(process.log)))
        prometheus = Prometheus(f"http://{address.group(1)}", process)
        process.wait_until("/-/ready", lambda: get(f"{prometheus.url}/-/ready")[0] == 200)
        yield prometheus
    finally:
        process.end()


def free_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tool(name: str) -> str:
    """The path of a program that a test needs. A test without its program has failed, not passed."""
    path = shutil.which(name, path=f"{ROOT / 'target/tools/usr/bin'}{os.pathsep}{os.environ['PATH']}")
    assert path, f"{name} is missing: `tests/run clients` installs it, or says how"
    return path


def run(*command: str | Path, base_url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A client's program in its own process, with only the base URL set."""
    done = subprocess.run(
        command,
        env={**os.environ, "OPENAI_BASE_URL": base_url, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=90,
    )
    print(f"--- {' '.join(map(str, command))}, status {done.returncode}", done.stdout, done.stderr, sep="\n")
    return done
