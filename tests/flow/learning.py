"""Cases of learning: what a gateway hides, and how near to an oracle weir and other clients come who are not told."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import peers
from client import PROMPT, Answer
from harness import running_simulator
from scene import Batch, at_times, bounded, seconds, stage

Call = dict[str, Any]
# Who plays calls against a chat function, each when it thinks best.
Player = Callable[[peers.Chat, list[Call]], Awaitable[list[Answer]]]

# A call that takes longer is an error: nothing here is due to take half of it.
PATIENCE = 60.0

# An oracle's first calls open connections and take longer than the others, which would come too early behind them.
LATE = 0.05

# In which one client's first calls are sent, before the next client begins.
HEAD_START = 0.3

# So that only quotas take time.
QUICK = "--first-token 50ms --spread 0 --per-token 0s"


@dataclass
class Figures:
    """What came of one client's calls."""

    client: str
    time: str
    of_the_oracle: str = ""
    refused: str = ""
    errors: str = ""
    attempts: str = ""
    goal: str = ""


COLUMNS = (
    "client",
    "time",
    "oracle's time / its time",
    "refused for each request",
    "errors",
    "attempts for each request",
    "goal: ratio; refused; errors",
)


@dataclass
class Through:
    """weir with a configuration, and the figures it should reach."""

    client: str
    config: str
    goal: str


def a_concurrency_cap() -> list[Figures]:
    """600 requests at once, before a gateway that serves 20 at a time, each in about 300 ms, and tells nothing."""
    cap = 20
    return compare(
        f"--first-token 300ms --per-token 0s --concurrency {cap} --hints none",
        [{}] * 600,
        so_many_at_once(cap),
        Through(f"{peers.WEIR}, told", f"[limits]\nconcurrency = {cap}", "0.97; 0.005; 0"),
        Through(peers.WEIR, "", "0.85; 0.05; 0"),
    )


def a_rate_with_headers() -> list[Figures]:
    """500 requests at once, at 50 a second; the gateway tells what remains."""
    rate, burst = 50, 5
    config = f'[limits]\nrequests = {{ rate = "{rate}/s", burst = {burst} }}'
    return compare(
        f"{QUICK} --requests {rate}/s --requests-burst {burst}",
        [{}] * 500,
        when_due([1] * 500, rate, burst),
        Through(f"{peers.WEIR}, told", config, "0.97; 0.005; 0"),
        Through(peers.WEIR, "", "0.95; 0.005; 0"),
    )


def a_fixed_window() -> list[Figures]:
    """360 requests at once, before windows of 30 each second; who is refused is told the whole seconds to wait."""
    count = 30
    return compare(
        f"{QUICK} --requests {count}/s --window fixed --hints retry-after",
        [{}] * 360,
        at([float(n // count) + LATE for n in range(360)]),
        Through(peers.WEIR, "", "0.90; 0.05; 0"),
    )


def a_rate_without_a_header() -> list[Figures]:
    """500 requests at once, at 50 a second; a refusal is all that the gateway tells."""
    rate, burst = 50, 5
    return compare(
        f"{QUICK} --requests {rate}/s --requests-burst {burst} --hints none",
        [{}] * 500,
        when_due([1] * 500, rate, burst),
        Through(peers.WEIR, "", "0.85; 0.06; 0"),
    )


def a_token_rate() -> list[Figures]:
    """400 requests of three sizes at once, before a quota of tokens that lets about 34 of them pass a second."""
    rate, burst = 8000, 1600
    calls = [{"max_tokens": (100, 200, 400)[n % 3]} for n in range(400)]
    # The gateway charges the prompt's text and max_tokens.
    costs = [-(-len(PROMPT) // 4) + call["max_tokens"] for call in calls]
    return compare(
        f"{QUICK} --tokens {rate}/s --tokens-burst {burst}",
        calls,
        when_due(costs, rate, burst),
        Through(peers.WEIR, "", "0.92; 0.01; 0"),
    )


def faults() -> list[Figures]:
    """300 requests at once, every other one a stream, before a gateway without limits that fails about one in ten."""
    faults = "--fault 503=0.05 --fault reset-before-answer=0.03 --fault error-event=0.05"
    return compare(
        f"--first-token 100ms --per-token 1ms {faults}",
        [{"stream": n % 2 == 0} for n in range(300)],
        None,
        Through(peers.WEIR, "", "-; -; 0"),
    )


def compare(gateway: str, calls: list[Call], oracle: Player | None, *through: Through) -> list[Figures]:
    """One line for each client."""
    # These have little to do at a time, so they can play beside each other.
    oracles = [(peers.counting, oracle)] if oracle else []
    *best, taught = straight(gateway, calls, *oracles, (peers.semaphore_and_backoff, at_once))
    known = best[0].batch.took if best else None
    lines = [played.figures("the oracle", known) for played in best]
    lines += [through_weir(gateway, calls, it.config).figures(it.client, known, it.goal) for it in through]
    if peers.sdk_is_missing():
        lines.append(Figures(peers.SDK, peers.NO_SDK))
    else:
        lines += [played.figures(peers.SDK, known) for played in straight(gateway, calls, (peers.openai_sdk, at_once))]
    return [*lines, taught.figures(peers.TUTORIAL, known)]


@dataclass
class Played:
    batch: Batch
    stats: dict[str, Any]

    def figures(self, client: str, known: float | None, goal: str = "") -> Figures:
        count, errors = len(self.batch.answers), self.batch.errors
        ratio = f"{known / self.batch.took:.3f}" if known else "-"
        return Figures(
            client,
            seconds(self.batch.took),
            # Who gives up is done early.
            f"({ratio})" if known and errors else ratio,
            f"{sum(self.stats['refused'].values()) / count:.3f}",
            str(errors),
            f"{self.stats['requests'] / count:.3f}",
            goal,
        )


def straight(gateway: str, calls: list[Call], *clients: tuple[peers.Opening, Player]) -> list[Played]:
    """The clients beside each other, each at a gateway of its own."""

    async def one(nth: int, opening: peers.Opening, player: Player) -> Batch:
        await asyncio.sleep(nth * HEAD_START)
        return await play(opening, player, simulators[nth].base_url, calls)

    async def all_of_them() -> list[Batch]:
        return await asyncio.gather(*(one(nth, *client) for nth, client in enumerate(clients)))

    with ExitStack() as stack:
        simulators = [stack.enter_context(running_simulator(*gateway.split())) for _ in clients]
        batches = asyncio.run(all_of_them())
        return [Played(batch, simulator.stats()) for batch, simulator in zip(batches, simulators)]


def through_weir(gateway: str, calls: list[Call], config: str) -> Played:
    with stage(gateway, config) as through:
        batch = asyncio.run(play(peers.counting, at_once, through.weir.base_url, calls))
        return Played(batch, through.simulator.stats())


async def play(opening: peers.Opening, player: Player, base_url: str, calls: list[Call]) -> Batch:
    until = time.monotonic() + PATIENCE
    async with opening(base_url) as chat:
        return Batch(await player(lambda **call: bounded(chat(**call), until), calls))


async def at_once(chat: peers.Chat, calls: list[Call]) -> list[Answer]:
    return await asyncio.gather(*(chat(**call) for call in calls))


def so_many_at_once(cap: int) -> Player:
    """Never one more, and never one less while there is something to do."""

    async def play(chat: peers.Chat, calls: list[Call]) -> list[Answer]:
        left = iter(calls)

        async def one_after_another() -> list[Answer]:
            return [await chat(**call) for call in left]

        return list(chain.from_iterable(await asyncio.gather(*(one_after_another() for _ in range(cap)))))

    return play


def when_due(costs: list[int], rate: int, burst: int) -> Player:
    """Each as soon as a bucket that is full at first has what all up to this one cost."""
    missing = (spent - burst for spent in accumulate(costs))
    return at([units / rate + LATE if units > 0 else 0.0 for units in missing])


def at(times: list[float]) -> Player:
    async def play(chat: peers.Chat, calls: list[Call]) -> list[Answer]:
        left = iter(calls)
        return await at_times(times, lambda: chat(**next(left)))

    return play


CASES = [a_concurrency_cap, a_rate_with_headers, a_fixed_window, a_rate_without_a_header, a_token_rate, faults]
