"""Twenty product reviews, all sent at once, and the figures of the batch.

How many run at a time, and how fast they start, is weir's business: the limits stand in its
config, for this program and for every other that shares the gateway's quota.
"""

import asyncio
import os
import statistics
import sys
import time

import aiohttp

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
# Any key will do where weir holds the gateway's key; otherwise this is the gateway's.
API_KEY = os.environ.get("OPENAI_API_KEY", "any")

PRODUCTS = ["전기 주전자", "캠핑 의자", "손목 보호대", "휴대용 선풍기", "고양이 정수기"]
VIEWS = ["처음 써 본 날", "한 달 쓴 뒤", "선물로 준 뒤", "고장 나서 수리한 뒤"]
PROMPTS = [f"{product}: {view}의 느낌으로 짧은 상품 후기를 써 주세요." for product in PRODUCTS for view in VIEWS]


async def ask(session: aiohttp.ClientSession, prompt: str) -> tuple[float, int]:
    """The seconds the answer took, waiting included, and the tokens it cost."""
    call = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": prompt}], "max_tokens": 300}
    begun = time.monotonic()
    async with session.post(f"{BASE_URL}/chat/completions", json=call) as response:
        answer = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer['error']['message']}")
        return time.monotonic() - begun, answer["usage"]["total_tokens"]


async def main() -> int:
    begun = time.monotonic()
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {API_KEY}"},
        connector=aiohttp.TCPConnector(limit=0),  # aiohttp would hold back all but 100; weir holds back what must wait
        timeout=aiohttp.ClientTimeout(total=600),  # a large batch waits in weir's queue for its quota
    ) as session:
        results = await asyncio.gather(*(ask(session, prompt) for prompt in PROMPTS), return_exceptions=True)
    elapsed = time.monotonic() - begun

    failures = [result for result in results if isinstance(result, BaseException)]
    answers = [result for result in results if not isinstance(result, BaseException)]
    print(f"{len(answers)} answered, {len(failures)} failed, in {elapsed:.2f} s")
    for failure in failures:
        print(f"  {failure!r}")
    if answers:
        times = [seconds for seconds, _ in answers]
        print(f"waited and answered: median {statistics.median(times):.2f} s, slowest {max(times):.2f} s")
        print(f"tokens: {sum(tokens for _, tokens in answers)}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
