"""A client written the usual way: four look-ups at once under a timeout of 30 s, which reads
`choices` without a look at the status. An error answer is a KeyError here.

It knows nothing of weir; only its base URL is set.
"""

import asyncio
import os
import sys

import aiohttp


class SupportDesk:
    def __init__(self, key):
        self.base_url = os.environ["OPENAI_BASE_URL"]
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.timeout = aiohttp.ClientTimeout(total=30)

    async def article(self, number):
        return f"{number}: 방수 배낭 25L"

    async def shelf(self, number):
        return f"{number}: 광주 12개, 제주 3개"

    async def digest(self, session, number):
        prompt = f"{number}번 배낭의 후기를 정리해 주세요: '비를 맞아도 안 젖어요', '어깨끈이 얇아요'"
        return await self.ask(session, "gpt-4.1-mini", prompt)

    async def advice(self, session, number, person):
        return await self.ask(session, "deepseek-chat", f"{person}에게 {number}번 배낭을 권해 주세요.")

    async def ask(self, session, model, prompt):
        async with session.post(
            f"{self.base_url}/chat/completions",
            headers=self.headers,
            json={"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 180},
        ) as response:
            result = await response.json()
            return result["choices"][0]["message"]["content"]

    async def reply(self, number, person):
        async with aiohttp.ClientSession(timeout=self.timeout) as session:
            return await asyncio.gather(
                self.article(number),
                self.digest(session, number),
                self.shelf(number),
                self.advice(session, number, person),
            )


async def main():
    desk = SupportDesk("any")
    for number, person in [("B-7", "산을 좋아하는 대학생"), ("B-9", "출장이 잦은 회사원")]:
        for line in await desk.reply(number, person):
            print(line[:70])


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyError as missing:
        sys.exit(f"failed: the answer has no {missing}")
