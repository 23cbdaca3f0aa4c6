"""Five prompts at once, with the tokens each one cost and the time the gateway took.

There is no semaphore, no retry and no stopwatch here: weir queues what the quota does not allow
yet, tries again what the gateway refuses, and tells the time of each answer in `x-response-time`.
"""

import asyncio
import os
import sys

import aiohttp

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
# Any key will do where weir holds the gateway's key; otherwise this is the gateway's.
API_KEY = os.environ.get("OPENAI_API_KEY", "any")

PROMPTS = [
    "다음 후기에서 장점과 단점을 하나씩 골라 주세요: '화면은 선명한데 충전기가 자꾸 뜨거워져요'",
    "환불을 요청한 손님의 기분을 한 단어로 말해 주세요: '두 번이나 잘못 왔네요. 이번엔 꼭 확인해 주세요'",
    "등산용 보온병의 광고 문구를 한 줄로 써 주세요. 특징: 350g, 12시간 보온",
    "이 문의를 배송, 교환, 결제 가운데 하나로 분류해 주세요: '카드가 두 번 승인됐어요'",
    "재택근무를 시작한 분께 어울리는 책상 조명을 추천하는 문장을 써 주세요.",
]


async def ask(session: aiohttp.ClientSession, prompt: str) -> dict:
    call = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": prompt}], "max_tokens": 300}
    async with session.post(f"{BASE_URL}/chat/completions", json=call) as response:
        answer = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer['error']['message']}")
        return {
            "text": answer["choices"][0]["message"]["content"],
            "usage": answer["usage"],
            "milliseconds": response.headers["x-response-time"],
        }


async def main() -> int:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_KEY}"}) as session:
        answers = await asyncio.gather(*(ask(session, prompt) for prompt in PROMPTS), return_exceptions=True)

    for number, answer in enumerate(answers, 1):
        if isinstance(answer, BaseException):
            print(f"{number}. failed: {answer!r}")
        else:
            tokens = answer["usage"]["total_tokens"]
            print(f"{number}. {answer['milliseconds']} ms, {tokens} tokens: {answer['text'][:60]}")
    return int(any(isinstance(answer, BaseException) for answer in answers))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
