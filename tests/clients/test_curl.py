"""curl, over HTTP/1.1 and HTTP/2: the bytes and headers a client sees."""

import json
import subprocess
import time
from contextlib import ExitStack

import pytest

from gateway import Answer, Stream, chunk, completion
from harness import DEADLINE, QUICK, tool, wait_until

CALL = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "안녕하세요"}]}
JSON = ["--header", "content-type: application/json"]
POST = [*JSON, "--data", json.dumps(CALL)]
POST_STREAM = [*JSON, "--data", json.dumps({**CALL, "stream": True})]

# How to call curl for each version, and what it writes for `%{http_version}`.
VERSIONS = [
    pytest.param(["--http1.1"], "1.1", id="HTTP/1.1"),
    pytest.param(["--http2-prior-knowledge"], "2", id="HTTP/2"),
]


def curl(*arguments: str) -> str:
    done = subprocess.run(
        [tool("curl"), "--silent", "--show-error", "--max-time", "60", *arguments],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"curl ended with {done.returncode}: {done.stderr}"
    return done.stdout


def curl_with_head(*arguments: str) -> tuple[int, list[tuple[str, str]], str]:
    """Status, headers (names in lower case) and body."""
    head, _, body = curl("--include", *arguments).replace("\r\n", "\n").partition("\n\n")
    status, *lines = head.split("\n")
    headers = [line.partition(":") for line in lines]
    return int(status.split()[1]), [(name.lower(), value.strip()) for name, _, value in headers], body


@pytest.fixture
def start_curl(stack: ExitStack):
    """A curl that runs beside the test, its output line by line; ended with the test."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [tool("curl"), "--silent", "--no-buffer", "--max-time", "60", *arguments],
            stdout=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip
        stack.callback(lambda: (child.kill(), child.wait(), child.stdout.close()))
        return child

    return start


def event(child: subprocess.Popen[str]) -> str:
    """The next event's data."""
    for line in child.stdout:
        if line.startswith("data: "):
            return line.removeprefix("data: ").rstrip("\n")
    raise AssertionError("the stream ended before its next event")


@pytest.mark.parametrize(("flags", "version"), VERSIONS)
def test_a_plain_call(flags, version, gateway, start_weir):
    gateway.answers(Answer(body=completion("네, 반갑습니다.")))
    weir = start_weir(gateway)
    url = f"{weir.base_url}/chat/completions"
    body, spoken = curl(*flags, *POST, "--write-out", "\n%{http_version} %{http_code}", url).rsplit("\n", 1)
    assert json.loads(body) == completion("네, 반갑습니다.")
    assert spoken == f"{version} 200"
    assert gateway.calls[0].json() == CALL


@pytest.mark.parametrize(("flags", "version"), VERSIONS)
def test_events_arrive_one_by_one(flags, version, gateway, start_weir, start_curl):
    """The gateway holds back each event until curl has shown the one before it."""
    words = ["하나", "둘", "셋", "넷"]
    stream = Stream(words)
    gateway.answers(stream)
    weir = start_weir(gateway)
    child = start_curl(*flags, *POST_STREAM, f"{weir.base_url}/chat/completions")
    for number, word in enumerate(words, 1):
        assert json.loads(event(child)) == chunk(word)
        assert stream.sent == number
        stream.release()
    assert event(child) == "[DONE]"
    assert child.wait(DEADLINE) == 0


@pytest.mark.parametrize(("flags", "version"), VERSIONS)
def test_an_unknown_path_is_a_404_that_says_how_to_set_the_base_url(flags, version, gateway, start_weir):
    weir = start_weir(gateway)
    status, headers, body = curl_with_head(*flags, *POST, f"{weir.origin}/chat/completions")
    assert status == 404
    assert dict(headers)["content-type"].startswith("application/json")
    answer = json.loads(body)["error"]
    assert (answer["type"], answer["code"]) == ("invalid_request_error", "unknown_path")
    assert "/v1" in answer["message"]
    assert gateway.calls == []


@pytest.mark.parametrize(("flags", "version"), VERSIONS)
def test_an_error_that_weir_knows_before_the_body_has_come_still_reaches_the_client(
    flags, version, gateway, start_weir, tmp_path
):
    """Debian 12's curl takes a stream that is reset while it uploads for a broken one, whatever came before."""
    body = tmp_path / "body"
    body.write_bytes(b"x" * 200_000)
    weir = start_weir(gateway)
    status, _, answer = curl_with_head(*flags, "--header", "expect:", "--data-binary", f"@{body}", f"{weir.origin}/x")
    assert status == 404
    assert json.loads(answer)["error"]["code"] == "unknown_path"
    assert gateway.calls == []


@pytest.mark.parametrize(("flags", "version"), VERSIONS)
def test_headers_and_query_pass_and_hop_by_hop_headers_do_not(flags, version, gateway, start_weir):
    gateway.answers(
        Answer(body=completion(), headers=[("x-region", "seoul"), ("set-cookie", "a=1"), ("set-cookie", "b=2")])
    )
    weir = start_weir(gateway)
    hop_by_hop = ["--header", "connection: x-hop", "--header", "x-hop: 1"] if version == "1.1" else []
    status, headers, _ = curl_with_head(
        *flags, *POST, *hop_by_hop,
        "--header", "x-team: checkout",
        "--header", "authorization: Bearer my-own-key",
        f"{weir.base_url}/chat/completions?api%2Dversion=1&q=a%2Fb",
    )  # fmt: skip
    call = gateway.calls[0]
    assert call.target == "/v1/chat/completions?api%2Dversion=1&q=a%2Fb"
    assert call.header("x-team") == "checkout"
    assert call.header("authorization") == "Bearer my-own-key"
    assert call.header("host") == gateway.base_url.removeprefix("http://").removesuffix("/v1")
    assert call.header("via")
    assert call.header("x-hop") is None

    assert status == 200
    assert ("x-region", "seoul") in headers
    assert [value for name, value in headers if name == "set-cookie"] == ["a=1", "b=2"]
    added = dict(headers)
    assert added["x-request-id"]
    assert added["x-weir-attempts"] == "1"
    assert float(added["x-response-time"]) >= 0
    assert "queue;dur=" in added["server-timing"] and "upstream;dur=" in added["server-timing"]


def test_a_burst_above_the_quota_waits_and_is_all_answered(start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK), '[limits]\nrequests = { rate = "20/s", burst = 5 }')
    begun = time.monotonic()
    statuses = curl(
        "--parallel", "--parallel-immediate", "--parallel-max", "40", *POST,
        "--output", "/dev/null", "--write-out", "%{http_code}\n",
        f"{weir.base_url}/chat/completions?request=[1-40]",
    ).split()  # fmt: skip
    # 5 at once, 35 at 20 a second: never in less, whatever the machine.
    assert time.monotonic() - begun > 35 / 20 - 0.1
    assert statuses == ["200"] * 40
    assert weir.metric("weir_upstream_attempts_total", result="ok") == 40
    assert weir.metric("weir_refused_total") == 0


@pytest.mark.parametrize(("flags", "version"), VERSIONS)
def test_a_client_that_leaves_the_queue_is_forgotten(flags, version, gateway, start_weir, start_curl):
    gateway.answers(Stream(["하나", "둘"]), Answer(body=completion()))
    weir = start_weir(gateway, "[limits]\nconcurrency = 1")
    url = f"{weir.base_url}/chat/completions"
    served = start_curl(*flags, *POST_STREAM, url)
    event(served)
    waiting = start_curl(*flags, *POST, url)
    wait_until("the second waits", lambda: weir.metric("weir_waiting") == 1)
    waiting.terminate()
    wait_until("nobody waits", lambda: weir.metric("weir_waiting") == 0)
    assert weir.metric("weir_client_disconnects_total", phase="queue") == 1

    served.terminate()
    weir.wait_until_idle()
    gateway.wait_until_idle()
    assert len(gateway.calls) == 1
