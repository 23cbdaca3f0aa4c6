"""The OpenAI SDK through weir: nothing changes but the base URL.

The SDK's own retries may stay on. Where weir has already tried and given up, it says
`x-should-retry: false`; where it refuses for a quota, it says when to come back. The SDK obeys both.
"""

import os
import sys

import openai

client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1"),
    # Any key will do where weir holds the gateway's key; otherwise this is the gateway's.
    api_key=os.environ.get("OPENAI_API_KEY", "any"),
)


def plain() -> None:
    answer = client.chat.completions.create(
        model="gpt-4.1-mini",
        messages=[{"role": "user", "content": "비 오는 날에 어울리는 차를 하나 골라 주세요."}],
        max_tokens=200,
    )
    print(answer.choices[0].message.content)
    print(f"({answer.usage.total_tokens} tokens)")


def streaming() -> None:
    stream = client.chat.completions.create(
        model="deepseek-chat",
        messages=[{"role": "user", "content": "그 차를 맛있게 우리는 법을 알려 주세요."}],
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n({chunk.usage.total_tokens} tokens)")


if __name__ == "__main__":
    try:
        plain()
        streaming()
    except openai.OpenAIError as failure:
        sys.exit(f"failed: {failure}")
