"""Other clients to compare with, straight at the gateway: each opens as a function that makes one chat call."""

import asyncio
import importlib.util
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

from client import BROKEN, MODEL, PROMPT, Answer, Client

Chat = Callable[..., Awaitable[Answer]]
Opening = Callable[[str], AbstractAsyncContextManager[Chat]]

AT_ONCE = 10
RETRIES = 3


@asynccontextmanager
async def counting(base_url: str, key: str = "any") -> AsyncIterator[Chat]:
    """The client that only counts."""
    client = Client(base_url, key)
    try:
        yield client.chat
    finally:
        client.close()


@asynccontextmanager
async def semaphore_and_backoff(base_url: str) -> AsyncIterator[Chat]:
    """What tutorials teach: so many at once, and a retry after 2^n + U(0, 1) seconds, whatever the gateway says."""
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(**call: Any) -> Answer:
        begun = time.monotonic()
        async with places:
            answer = await chat(**call)
            for attempt in range(RETRIES):
                if answer.status not in (BROKEN, 429) and answer.status < 500:
                    break
                await asyncio.sleep(2**attempt + random.uniform(0, 1))
                answer = await chat(**call)
        return replace(answer, begun=begun)

    async with counting(base_url) as chat:
        yield ask


@asynccontextmanager
async def openai_sdk(base_url: str) -> AsyncIterator[Chat]:
    """The openai SDK with its defaults: two retries, when the gateway says, or else after half a second and more."""
    import openai

    async def ask(prompt: str = PROMPT, **call: Any) -> Answer:
        begun = time.monotonic()
        status = 200
        try:
            answer = await sdk.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}], **call
            )
            if call.get("stream"):
                async for _ in answer:
                    pass
        except openai.APIStatusError as error:
            status = error.status_code
        except Exception:
            # A broken connection or stream comes as an error of the SDK's or of what it is built on.
            status = BROKEN
        return Answer(status, {}, begun, time.monotonic())

    async with openai.AsyncOpenAI(base_url=base_url, api_key="any") as sdk:
        yield ask


def sdk_is_missing() -> bool:
    return importlib.util.find_spec("openai") is None


WEIR = "through weir"
SDK = "the openai SDK"
TUTORIAL = "the tutorial's client"
NO_SDK = "not measured, as this Python has no package openai (docs/flow.md)"
