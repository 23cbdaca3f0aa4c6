"""A gateway that does what the test says, one answer after the other.

`weir simulate` behaves like a real gateway; this one behaves as scripted: a certain error on the
second call, an event held back until the test lets it go. It runs on a thread of its own.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from harness import DEADLINE, wait_until


@dataclass
class Call:
    """A request as it arrived."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: dict | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Stream:
    """Server-sent events; each waits for its turn: `release()` lets one more go."""

    words: list[str]
    allowed: int = 1
    sent: int = 0

    def release(self) -> None:
        self.allowed += 1

    async def events(self) -> AsyncIterator[str]:
        for number, word in enumerate(self.words, 1):
            while self.allowed < number:
                await asyncio.sleep(0.002)
            self.sent = number
            yield "data: " + json.dumps(chunk(word), ensure_ascii=False) + "\n\n"
        yield "data: [DONE]\n\n"


class Stall:
    """No answer, for as long as the client waits."""


class Reset:
    """The connection breaks before the answer."""


Reaction = Answer | Stream | Stall | Reset


def completion(text: str = "네, 알겠습니다.") -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4.1-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }


def chunk(word: str) -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4.1-mini",
        "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
    }


def error(message: str, kind: str = "server_error", code: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Gateway:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.base_url = ""
        self.react: Callable[[Call], Reaction] = lambda _: Answer(body=completion())

    def answers(self, *reactions: Reaction) -> None:
        """One after the other; the last for all that follow."""
        left = list(reactions)
        self.react = lambda _: left.pop(0) if len(left) > 1 else left[0]

    def wait_until_idle(self) -> None:
        wait_until("the gateway has nothing in flight", lambda: self.in_flight == 0)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            call = Call(request.method, request.raw_path, list(request.headers.items()), await request.read())
            self.calls.append(call)
            return await self.answer(request, self.react(call))
        finally:
            self.in_flight -= 1

    async def answer(self, request: web.Request, reaction: Reaction) -> web.StreamResponse:
        match reaction:
            case Answer(status, body, headers):
                response = web.json_response(body, status=status)
                for name, value in headers:
                    response.headers.add(name, value)
                return response
            case Stream():
                response = web.StreamResponse(headers={"content-type": "text/event-stream"})
                await response.prepare(request)
                async for event in reaction.events():
                    await response.write(event.encode())
                return response
            case Stall():
                return await asyncio.Event().wait()  # type: ignore[return-value]
            case Reset():
                assert request.transport is not None
                request.transport.abort()
                return web.Response()


@contextmanager
def running_gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", gateway.handle)
        # A client that hangs up cancels its handler, as in most servers.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        gateway.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(DEADLINE)
    try:
        yield gateway
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(DEADLINE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE)
        loop.close()
