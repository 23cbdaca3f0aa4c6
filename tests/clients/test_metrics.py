"""What a real Prometheus's own checker says of /metrics."""

import subprocess

import openai
import pytest

from gateway import Answer, Stream, completion, error
from harness import tool

CALL = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "안녕하세요"}]}


def test_promtool_finds_nothing_to_say_of_the_metrics(gateway, start_weir):
    gateway.answers(
        Answer(503, error("try later")),
        Answer(body=completion()),
        Stream(["네", "!"], allowed=2),
        Answer(400, error("no")),
    )
    weir = start_weir(gateway, '[retry]\nbase_delay = "10ms"\n[limits]\nrequests = "600/min"\nconcurrency = 4')
    with openai.OpenAI(base_url=weir.base_url, api_key="any") as client:
        client.chat.completions.create(**CALL)
        list(client.chat.completions.create(**CALL, stream=True))
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**CALL)

    metrics = weir.metrics()
    check = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=metrics, capture_output=True, text=True, encoding="utf-8"
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    # All of it was there to be checked.
    for name in ["weir_requests_total", "weir_retries_total", "weir_request_duration_seconds_bucket", "weir_in_flight"]:
        assert name in metrics
