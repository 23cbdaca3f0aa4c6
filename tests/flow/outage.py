"""A gateway that is away for four seconds: how soon a steady load flows again, and what is sent meanwhile."""

import asyncio
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import peers
from harness import Simulator, running_simulator
from scene import Batch, at_times, bounded, seconds, stage

LOAD, LASTS = 40, 14
OUTAGE = (5, 9)
GATEWAY = f"--first-token 100ms --spread 0 --per-token 0s --outage {OUTAGE[0]}s..{OUTAGE[1]}s"
REQUESTS = LOAD * LASTS

# In which the served and the started are counted.
WINDOW = 0.5
# The load flows again when this part of it is served.
BACK = 0.9

# Counted from the load's start.
PATIENCE = 45.0


@dataclass
class Figures:
    client: str
    back: str
    most_started: str = ""
    errors: str = ""
    attempts: str = ""
    goal: str = ""


COLUMNS = (
    "client",
    "the load flows again after",
    "most started then, over the load",
    "errors",
    "attempts for each request",
    "goal: again after; errors; attempts",
)


def an_outage() -> list[Figures]:
    """40 requests a second for 14 s; from 5 s to 9 s the gateway answers each with a 503."""
    with stage(GATEWAY) as through:
        goal = f"2 s; 0; {1.2 + 10 / REQUESTS:.3f}"
        ours = asyncio.run(play(peers.counting, through.weir.base_url, through.simulator, through.begun))
    missing = [Figures(peers.SDK, peers.NO_SDK)] if peers.sdk_is_missing() else []
    sdk = {} if missing else {peers.SDK: peers.openai_sdk}
    return [ours.figures(peers.WEIR, goal), *missing, *straight(sdk | {peers.TUTORIAL: peers.semaphore_and_backoff})]


def straight(clients: dict[str, peers.Opening]) -> list[Figures]:
    """The clients beside each other, each at a gateway of its own."""

    async def all_of_them() -> list[Played]:
        return await asyncio.gather(*(play(opening, it.base_url, it, begun) for opening, (it, begun) in gateways))

    with ExitStack() as stack:
        gateways = [(opening, begin(stack)) for opening in clients.values()]
        return [played.figures(client) for client, played in zip(clients, asyncio.run(all_of_them()))]


def begin(stack: ExitStack) -> tuple[Simulator, float]:
    """A gateway, and when it began."""
    return stack.enter_context(running_simulator(*GATEWAY.split())), time.monotonic()


@dataclass
class Played:
    batch: Batch
    # How many requests had reached the gateway, at moments one after the other.
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
        """From the outage's end to the end of the first window after it in which enough were served."""
        enough = round(BACK * LOAD * WINDOW)
        served = sorted(answer.ended for answer in self.batch.answers if answer.good)
        for first, last in zip(served, served[enough - 1 :]):
            if first >= self.end_of_outage and last - first <= WINDOW:
                return last - self.end_of_outage
        return None

    def most_started(self) -> int:
        """The most that reached the gateway in one window after the outage."""
        after = [(at, count) for at, count in self.arrivals if at >= self.end_of_outage]
        return max(
            (later - count for at, count in after for then, later in after if 0 <= then - at <= WINDOW), default=0
        )


async def play(opening: peers.Opening, base_url: str, simulator: Simulator, begun: float) -> Played:
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
