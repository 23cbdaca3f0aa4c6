"""A client written the usual way: five calls gathered, an exception for any status but 200.

It knows nothing of weir; only its base URL is set.
"""

import asyncio
import os
import sys

import aiohttp

BASE_URL = os.environ["OPENAI_BASE_URL"]
QUESTIONS = [
    "이 후기의 말투를 설명해 주세요: '생각보다 작지만 튼튼합니다'",
    "다음 불만의 원인을 짚어 주세요: '설명서가 다른 나라 말로 왔어요'",
    "자전거 전조등의 상품 제목을 지어 주세요.",
    "배송이 늦은 손님께 보낼 사과 문자를 써 주세요.",
    "캠핑을 처음 가는 사람에게 필요한 물건을 세 가지만 알려 주세요.",
]


async def call(session, question):
    headers = {"Authorization": "Bearer any", "Content-Type": "application/json"}
    payload = {
        "model": "gpt-4.1-mini",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 400,
        "temperature": 0.5,
    }
    async with session.post(f"{BASE_URL}/chat/completions", headers=headers, json=payload) as response:
        result = await response.json()
        if response.status != 200:
            raise Exception(f"the gateway says: {result.get('error', 'nothing')}")
        return {
            "text": result["choices"][0]["message"]["content"],
            "usage": result.get("usage", {}),
            "took": response.headers.get("x-response-time", "N/A"),
        }


async def main():
    async with aiohttp.ClientSession() as session:
        results = await asyncio.gather(*[call(session, question) for question in QUESTIONS], return_exceptions=True)
    for question, result in zip(QUESTIONS, results):
        if isinstance(result, Exception):
            print(f"failed: {question}: {result}")
        else:
            # Where the header is missing this raises, as a test should.
            print(
                f"{float(result['took']):.1f} ms, {result['usage'].get('total_tokens')} tokens: {result['text'][:50]}"
            )
    return any(isinstance(result, Exception) for result in results)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
