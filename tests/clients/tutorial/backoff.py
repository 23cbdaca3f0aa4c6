"""A client written the usual way: a retry loop of its own, with exponential backoff and jitter.

It knows nothing of weir; only its base URL is set. Behind weir the loop has nothing to do, and the
program fails if it ever comes round twice.
"""

import asyncio
import os
import random
import sys

import aiohttp

BASE_URL = os.environ["OPENAI_BASE_URL"]
RETRIES = 3


async def ask(session, prompt):
    last = None
    for attempt in range(RETRIES + 1):
        try:
            async with session.post(
                f"{BASE_URL}/chat/completions",
                headers={"Authorization": "Bearer any"},
                json={"model": "deepseek-chat", "messages": [{"role": "user", "content": prompt}], "max_tokens": 300},
                timeout=aiohttp.ClientTimeout(total=60),
            ) as response:
                if response.status == 200:
                    result = await response.json()
                    return {"text": result["choices"][0]["message"]["content"], "attempts": attempt + 1}
                if response.status != 429 and response.status < 500:
                    result = await response.json()
                    return {"error": result.get("error", {}).get("message", "unknown"), "attempts": attempt + 1}
                last = f"status {response.status}"
        except asyncio.TimeoutError:
            last = "timeout"
        except aiohttp.ClientError as failure:
            last = f"connection: {failure}"
        if attempt < RETRIES:
            print(f"attempt {attempt + 1} failed: {last}")
            await asyncio.sleep(min(2**attempt + random.uniform(0, 1), 30))
    return {"error": last, "attempts": RETRIES + 1}


async def main():
    prompts = [f"{season}에 읽기 좋은 책을 한 권 골라 주세요." for season in ["봄", "여름", "가을", "겨울"]]
    async with aiohttp.ClientSession() as session:
        results = await asyncio.gather(*[ask(session, prompt) for prompt in prompts])
    for prompt, result in zip(prompts, results):
        print(f"{prompt} {result}")
    return any("error" in result or result["attempts"] > 1 for result in results)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
