"""What the cases share: a gateway with weir before it, load at given times, and a row of the table."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from client import BROKEN, Answer, Client
from harness import Simulator, Weir, running_simulator, running_weir

T = TypeVar("T")


@dataclass
class Row:
    """A figure, and what it would be if all went as well as it can, or what it should not exceed."""

    figure: str
    measured: str
    goal: str = ""


# The heads of a table of rows.
FIGURES = ("figure", "measured", "at best, or at most")


@dataclass
class Stage:
    simulator: Simulator
    weir: Weir
    # When the simulator had begun, by time.monotonic().
    begun: float

    def refused_upstream(self) -> int:
        return sum(self.simulator.stats()["refused"].values())


@contextmanager
def stage(gateway: str, config: str = "") -> Iterator[Stage]:
    """`weir simulate` with these arguments, and `weir serve` before it."""
    with tempfile.TemporaryDirectory() as directory, running_simulator(*gateway.split()) as simulator:
        begun = time.monotonic()
        with running_weir(Path(directory), simulator.base_url, config) as weir:
            yield Stage(simulator, weir, begun)


@contextmanager
def client(base_url: str, key: str = "any") -> Iterator[Client]:
    it = Client(base_url, key)
    try:
        yield it
    finally:
        it.close()


async def at_times(times: Iterable[float], call: Callable[[], Awaitable[T]]) -> list[T]:
    """Calls at each of these times from now, whatever has become of the ones before."""
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def one(at: float) -> T:
        await asyncio.sleep(begun + at - loop.time())
        return await call()

    return await asyncio.gather(*(one(at) for at in times))


async def bounded(call: Awaitable[Answer], until: float) -> Answer:
    """The call's answer; one that has not come by then counts as none."""
    begun = time.monotonic()
    try:
        return await asyncio.wait_for(call, until - begun)
    except asyncio.TimeoutError:
        return Answer(BROKEN, {}, begun, time.monotonic())


class Batch:
    """The answers to calls that belong together."""

    def __init__(self, answers: list[Answer]):
        self.answers = answers
        self.begun = min(answer.begun for answer in answers)
        self.took = max(answer.ended for answer in answers) - self.begun
        self.errors = sum(not answer.good for answer in answers)


def percentile(values: Iterable[float], percent: int) -> float:
    """The smallest of the values that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def seconds(value: float) -> str:
    return f"{value:.2f} s"
