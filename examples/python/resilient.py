"""A client that survives failures and has no retry code.

Rate limits, overload, dropped connections: weir tries again and shows in `x-weir-attempts` how often
it had to. What is left for a client is to take "no" for an answer: one failed prompt must not cost
the others, and an error says why, and when trying again makes sense.
"""

import asyncio
import os
import sys
from dataclasses import dataclass

import aiohttp

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
# Any key will do where weir holds the gateway's key; otherwise this is the gateway's.
API_KEY = os.environ.get("OPENAI_API_KEY", "any")

WORDS = ["가을", "첫눈", "밤기차", "빈 의자", "우산", "손편지", "새벽 시장", "오래된 지도", "등대", "보름달"]


@dataclass
class Outcome:
    prompt: str
    text: str | None = None
    attempts: str = "-"
    error: str | None = None


async def ask(session: aiohttp.ClientSession, prompt: str) -> Outcome:
    call = {"model": "deepseek-chat", "messages": [{"role": "user", "content": prompt}], "max_tokens": 200}
    try:
        async with session.post(f"{BASE_URL}/chat/completions", json=call) as response:
            answer = await response.json()
            attempts = response.headers.get("x-weir-attempts", "-")
            if response.status == 200:
                return Outcome(prompt, text=answer["choices"][0]["message"]["content"], attempts=attempts)
            error = f"{response.status}: {answer['error']['message']}"
            if "retry-after" in response.headers:
                error += f" (worth trying again in {response.headers['retry-after']} s)"
            return Outcome(prompt, attempts=attempts, error=error)
    except (aiohttp.ClientError, asyncio.TimeoutError) as failure:
        return Outcome(prompt, error=f"weir can't be reached at {BASE_URL}: {failure!r}")


async def main() -> int:
    prompts = [f"'{word}' 하면 떠오르는 장면을 한 문장으로 그려 주세요." for word in WORDS]
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_KEY}"}) as session:
        outcomes = await asyncio.gather(*(ask(session, prompt) for prompt in prompts))

    for outcome in outcomes:
        result = f"failed: {outcome.error}" if outcome.error else outcome.text[:60]
        print(f"attempts {outcome.attempts:>2}  {outcome.prompt}\n             {result}")
    failed = sum(outcome.error is not None for outcome in outcomes)
    print(f"{len(outcomes) - failed} answered, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
