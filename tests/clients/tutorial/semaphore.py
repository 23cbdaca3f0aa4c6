"""A client written the usual way: a batch of twenty behind a semaphore of its own, which reads an
error answer with the same chain of `get` as a good one.

It knows nothing of weir; only its base URL is set.
"""

import asyncio
import os
import sys
import time

import aiohttp


class Batch:
    def __init__(self, at_once):
        self.base_url = os.environ["OPENAI_BASE_URL"]
        self.semaphore = asyncio.Semaphore(at_once)
        self.sent = 0

    async def call(self, session, prompt):
        async with self.semaphore:
            self.sent += 1
            begun = time.time()
            async with session.post(
                f"{self.base_url}/chat/completions",
                headers={"Authorization": "Bearer any", "Content-Type": "application/json"},
                json={"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": prompt}], "max_tokens": 250},
            ) as response:
                result = await response.json()
                return {
                    "status": response.status,
                    "content": result.get("choices", [{}])[0].get("message", {}).get("content", ""),
                    "error": result.get("error", {}).get("message", ""),
                    "milliseconds": (time.time() - begun) * 1000,
                }

    async def run(self, prompts):
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*[self.call(session, prompt) for prompt in prompts], return_exceptions=True)


async def main():
    batch = Batch(at_once=5)
    results = await batch.run([f"{number}번째 손님이 쓴 것처럼 짧은 우산 후기를 써 주세요." for number in range(1, 21)])
    good = [result for result in results if isinstance(result, dict) and result["status"] == 200 and result["content"]]
    print(f"{len(good)} of {batch.sent} answered")
    for result in results:
        if result not in good:
            print(f"failed: {result}")
    if good:
        print(f"mean: {sum(result['milliseconds'] for result in good) / len(good):.0f} ms")
    return len(good) != 20


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
