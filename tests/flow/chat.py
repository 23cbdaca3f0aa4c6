"""A chat message beside a batch of the same program: how long somebody waits for it."""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass

import peers
from harness import running_simulator
from scene import Batch, at_times, bounded, seconds, stage

GATEWAY = "--first-token 50ms --spread 0 --per-token 0s --requests 20/s --requests-burst 2"
CLIENTS = """
    [upstream]
    api_key = "any"
    [clients.batch]
    key = "batch"
    [clients.chat]
    key = "chat" """

PATIENCE = 60.0


@dataclass
class Figures:
    client: str
    waited: str
    took: str = ""
    errors: str = ""


COLUMNS = ("client", "the chat waited", "the batch took", "errors")


def a_batch_beside_a_chat() -> list[Figures]:
    """A batch of 300 requests at once, at 20 a second; a single message one second later."""
    with stage(GATEWAY, CLIENTS) as through:
        lines = [asyncio.run(through_weir(through.weir.base_url))]
    lines.append(Figures(peers.SDK, peers.NO_SDK) if peers.sdk_is_missing() else straight(peers.SDK, peers.openai_sdk))
    return [*lines, straight(peers.TUTORIAL, peers.semaphore_and_backoff)]


async def through_weir(base_url: str) -> Figures:
    async with AsyncExitStack() as stack:
        batch, chat = [await stack.enter_async_context(peers.counting(base_url, key)) for key in ("batch", "chat")]
        return await play(peers.WEIR, batch, chat)


def straight(client: str, opening: peers.Opening) -> Figures:
    """One program sends both, so they share what it has of semaphores and connections."""

    async def both(base_url: str) -> Figures:
        async with opening(base_url) as chat:
            return await play(client, chat, chat)

    with running_simulator(*GATEWAY.split()) as simulator:
        return asyncio.run(both(simulator.base_url))


async def play(client: str, batch: peers.Chat, chat: peers.Chat) -> Figures:
    until = time.monotonic() + PATIENCE
    answers, [answer] = await asyncio.gather(
        at_times([0.0] * 300, lambda: bounded(batch(), until)), at_times([1.0], lambda: bounded(chat(), until))
    )
    of_batch = Batch(answers)
    waited = seconds(answer.took) if answer.good else f"{seconds(answer.took)}, for an error"
    return Figures(client, waited, seconds(of_batch.took), str(of_batch.errors + (not answer.good)))


CASES = [a_batch_beside_a_chat]
