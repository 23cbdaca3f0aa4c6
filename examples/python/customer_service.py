"""A shop's customer service: one question, four look-ups at once, one reply.

The product and the stock come from the shop's own tables, the digest of the reviews from
gpt-4.1-mini, the recommendation from deepseek-chat. Both models are reached through one base URL;
weir keeps a queue and a count for each.
"""

import asyncio
import os
import sys
import time
from dataclasses import dataclass

import aiohttp

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
# Any key will do where weir holds the gateway's key; otherwise this is the gateway's.
API_KEY = os.environ.get("OPENAI_API_KEY", "any")

PRODUCTS = {"K-101": "접이식 블루투스 키보드, 210g, 세 대까지 연결", "M-204": "무소음 마우스, 건전지 하나로 열여덟 달"}
STOCK = {"K-101": {"인천": 34, "대전": 8}, "M-204": {"인천": 0, "대전": 112}}
REVIEWS = {
    "K-101": [
        "가방에 쏙 들어가서 출장 갈 때 꼭 챙깁니다",
        "키가 작아서 처음엔 오타가 많았어요",
        "연결이 한 번도 끊기지 않았어요",
    ],
    "M-204": ["도서관에서 써도 눈치 안 보여요", "손이 큰 사람에겐 조금 작습니다", "휠이 부드러워서 마음에 들어요"],
}


@dataclass
class Customer:
    name: str
    product: str
    question: str
    habits: str


class CustomerService:
    def __init__(self, session: aiohttp.ClientSession):
        self.session = session

    async def reply(self, customer: Customer) -> dict[str, str]:
        product, reviews, stock, recommendation = await asyncio.gather(
            self.product(customer.product),
            self.reviews(customer.product),
            self.stock(customer.product),
            self.recommendation(customer),
        )
        return {"product": product, "reviews": reviews, "stock": stock, "recommendation": recommendation}

    async def product(self, product: str) -> str:
        return PRODUCTS[product]

    async def stock(self, product: str) -> str:
        return ", ".join(f"{city} {count}개" for city, count in STOCK[product].items() if count)

    async def reviews(self, product: str) -> str:
        lines = "\n".join(f"- {review}" for review in REVIEWS[product])
        return await self.ask("gpt-4.1-mini", f"아래 후기를 두 문장으로 간추려 주세요.\n{lines}")

    async def recommendation(self, customer: Customer) -> str:
        product = PRODUCTS[customer.product]
        prompt = f"{customer.habits} 손님의 물음에 답하며 이 물건을 권해 주세요.\n{product}\n{customer.question}"
        return await self.ask("deepseek-chat", prompt)

    async def ask(self, model: str, prompt: str) -> str:
        call = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 200}
        async with self.session.post(f"{BASE_URL}/chat/completions", json=call) as response:
            answer = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{model}: {response.status}: {answer['error']['message']}")
            return answer["choices"][0]["message"]["content"]


async def main() -> int:
    customers = [
        Customer("하윤", "K-101", "카페에서 쓰기 좋을까요?", "일주일에 사흘은 밖에서 일하는"),
        Customer("도현", "M-204", "밤에 써도 조용한가요?", "아이를 재우고 나서 글을 쓰는"),
    ]
    begun = time.monotonic()
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_KEY}"}) as session:
        service = CustomerService(session)
        replies = await asyncio.gather(*(service.reply(customer) for customer in customers), return_exceptions=True)

    for customer, reply in zip(customers, replies):
        print(f"{customer.name}: {customer.question}")
        if isinstance(reply, BaseException):
            print(f"  failed: {reply!r}")
            continue
        for part, text in reply.items():
            print(f"  {part}: {text[:80]}")
    print(f"{len(customers)} customers in {time.monotonic() - begun:.2f} s")
    return int(any(isinstance(reply, BaseException) for reply in replies))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
