"""A client that counts: chat calls over kept-alive connections, with no retry, limit or patience of its own."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MODEL = "gpt-4.1-mini"
PROMPT = "Great value, fast delivery!"

# In place of a status: no answer came, or it broke off.
BROKEN = 0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    begun: float
    ended: float
    # A stream can fail under a good status.
    whole: bool = True

    @property
    def good(self) -> bool:
        return self.status == 200 and self.whole

    @property
    def took(self) -> float:
        return self.ended - self.begun

    @property
    def queued(self) -> float:
        """The seconds that it waited in weir's queue."""
        for entry in self.headers.get("server-timing", "").split(","):
            name, _, millis = entry.strip().partition(";dur=")
            if name == "queue" and millis:
                return float(millis) / 1000
        return 0.0

    @property
    def retry_after(self) -> float | None:
        millis = self.headers.get("retry-after-ms")
        return None if millis is None else float(millis) / 1000


@dataclass
class Client:
    """As many connections as there are calls at once; each is used again."""

    base_url: str
    key: str = "any"
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def chat(self, prompt: str = PROMPT, **more: object) -> Answer:
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}
        begun = time.monotonic()
        try:
            status, headers, text = await self._post(json.dumps(body).encode())
        except (OSError, EOFError):
            return Answer(BROKEN, {}, begun, time.monotonic())
        return Answer(status, headers, begun, time.monotonic(), not more.get("stream") or b"data: [DONE]" in text)

    async def _post(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(self.base_url)
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(url.hostname, url.port)
        head = (
            f"POST {url.path}/chat/completions HTTP/1.1\r\nhost: {url.netloc}\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            status, headers = read_head(await reader.readuntil(b"\r\n\r\n"))
            text = await read_body(reader, headers)
        except BaseException:
            writer.close()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((reader, writer))
        return status, headers, text

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


def read_head(head: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = head.decode("latin-1").rstrip().split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(status.split(" ")[1]), {name.lower(): value.strip() for name, _, value in fields}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """To its end: by its length, or in chunks without trailers."""
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(chunks)
