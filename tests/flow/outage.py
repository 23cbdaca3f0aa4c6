"""A gateway that is away for four seconds under a steady load: how soon the load flows again, and what is sent meanwhile."""

import asyncio
import bisect
import time
from contextlib import suppress
from dataclasses import dataclass

from harness import Simulator, running_simulator
from peers import NO_SDK, SDK, TUTORIAL, WEIR, Opening, counting, openai_sdk, sdk_is_missing, semaphore_and_backoff
from scene import Batch, at_times, bounded, seconds, stage

LOAD, LASTS = 40, 14
OUTAGE = (5, 9)
GATEWAY = f"--first-token 100ms --spread 0 --per-token 0s --outage {OUTAGE[0]}s..{OUTAGE[1]}s"
REQUESTS = LOAD * LASTS

# What the load is compared with over.
WINDOW = 0.5
# The load flows again at this part of it.
BACK = 0.9

# From the load's start: the last answers are due at its end, if none had to wait.
PATIENCE = 45.0


@dataclass
class Figures:
    client: str
    back: str
    highest: str = ""
    errors: str = ""
    attempts: str = ""
    goal: str = ""


COLUMNS = (
    "client",
    "the load flows again, after the outage's end",
    "most started then, over the load",
    "errors",
    "attempts, for each request",
    "of these at best, or at most",
)


def an_outage() -> list[Figures]:
    """40 requests a second for 14 s; from 5 s to 9 s the gateway answers each with a 503."""
    with stage(GATEWAY) as through:
        goal = f"2 s; -; 0; {1.2 + 10 / REQUESTS:.3f}"
        ours = asyncio.run(play(counting, through.weir.base_url, through.simulator, through.begun)).figures(WEIR, goal)
    if sdk_is_missing():
        return [ours, Figures(SDK, NO_SDK), straight(semaphore_and_backoff).figures(TUTORIAL)]
    return [ours, straight(openai_sdk).figures(SDK), straight(semaphore_and_backoff).figures(TUTORIAL)]


def straight(opening: Opening) -> "Played":
    with running_simulator(*GATEWAY.split()) as simulator:
        return asyncio.run(play(opening, simulator.base_url, simulator, time.monotonic()))


@dataclass
class Played:
    batch: Batch
    # When, and how many requests the gateway had seen by then.
    arrivals: list[tuple[float, int]]
    end_of_outage: float

    def figures(self, client: str, goal: str = "") -> Figures:
        back = self.back()
        return Figures(
            client,
            "never" if back is None else seconds(back),
            f"{self.most_started() / (LOAD * WINDOW):.1f}",
            str(self.batch.errors),
            f"{self.arrivals[-1][1] / REQUESTS:.3f}",
            goal,
        )

    def back(self) -> float | None:
        """From the outage's end to that of the first window in which as many were served as the load asks for."""
        enough = round(BACK * LOAD * WINDOW)
        served = sorted(answer.ended for answer in self.batch.answers if answer.good)
        for first, last in zip(served, served[enough - 1 :]):
            if first >= self.end_of_outage and last - first <= WINDOW:
                return last - self.end_of_outage
        return None

    def most_started(self) -> int:
        """The most that reached the gateway in a window after the outage."""
        after = [(at, count) for at, count in self.arrivals if at >= self.end_of_outage]
        starts = [at for at, _ in after]
        within = lambda at: after[bisect.bisect_right(starts, at + WINDOW) - 1][1]  # noqa: E731
        return max((within(at) - count for at, count in after), default=0)


async def play(opening: Opening, base_url: str, simulator: Simulator, begun: float) -> Played:
    until = time.monotonic() + PATIENCE
    arrivals: list[tuple[float, int]] = []
    watching = asyncio.create_task(watch(simulator, arrivals))
    async with opening(base_url) as chat:
        answers = await at_times((n / LOAD for n in range(REQUESTS)), lambda: bounded(chat(), until))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    arrivals.append((time.monotonic(), simulator.stats()["requests"]))
    return Played(Batch(answers), arrivals, begun + OUTAGE[1])


async def watch(simulator: Simulator, arrivals: list[tuple[float, int]]) -> None:
    while True:
        stats = await asyncio.to_thread(simulator.stats)
        arrivals.append((time.monotonic(), stats["requests"]))
        await asyncio.sleep(0.05)


CASES = [an_outage]
