"""What the cases share: a gateway with weir before it, load at given times, and a row of the table."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from client import Client
from harness import Simulator, Weir, running_simulator, running_weir

T = TypeVar("T")


@dataclass
class Row:
    """A figure, and what it would be if all went as well as it can, or what it should not exceed."""

    figure: str
    measured: str
    goal: str = ""


@dataclass
class Stage:
    simulator: Simulator
    weir: Weir

    def refused_upstream(self) -> int:
        return sum(self.simulator.stats()["refused"].values())


@contextmanager
def stage(gateway: str, config: str = "") -> Iterator[Stage]:
    """`weir simulate` with these arguments, and `weir serve` before it."""
    with tempfile.TemporaryDirectory() as directory, running_simulator(*gateway.split()) as simulator:
        with running_weir(Path(directory), simulator.base_url, config) as weir:
            yield Stage(simulator, weir)


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


def percentile(values: Iterable[float], percent: int) -> float:
    """The smallest of the values that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def seconds(value: float) -> str:
    return f"{value:.2f} s"
