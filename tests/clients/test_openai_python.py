"""The OpenAI SDK for Python: what it gets through weir, and what it does with weir's own answers."""

import asyncio
import math
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pytest

from gateway import Answer, Reset, Stall, Stream, completion, error
from harness import QUICK, free_port, wait_until

MODEL = "gpt-4.1-mini"
MESSAGES = [{"role": "user", "content": "우산을 하나 골라 주세요."}]
# The model is in the config, so its name stands in the metrics before its first success.
KNOWN_MODEL = f'[models."{MODEL}"]\nconcurrency = 4\n'
QUICK_RETRIES = '[retry]\nbase_delay = "10ms"\n'


@pytest.fixture
def client(stack: ExitStack):
    """A client of that weir; `max_retries` as the SDK has it unless the test says otherwise."""

    def client(weir, api_key="any", **options):
        return stack.enter_context(openai.OpenAI(base_url=weir.base_url, api_key=api_key, **options))

    return client


def ask(client: openai.OpenAI, **options):
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **options)


# --- answers


def test_a_plain_call_brings_text_usage_and_request_id(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK))
    answer = ask(client(weir))
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    assert answer._request_id


def test_a_stream_brings_its_pieces_and_its_usage(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK))
    chunks = list(ask(client(weir), stream=True, stream_options={"include_usage": True}))
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
    assert chunks[-1].usage.total_tokens > 0


def test_a_stream_that_asks_for_no_usage_brings_none_though_weir_counts_it(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK), KNOWN_MODEL + 'tokens = "1000000/min"')
    chunks = list(ask(client(weir), stream=True))
    assert len(chunks) > 1
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    weir.wait_until_idle()
    assert weir.metric("weir_tokens_total", kind="completion") > 0
    assert weir.metric("weir_reserved_tokens") == 0


def test_the_rest_of_the_token_quota_stands_in_the_headers(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK), KNOWN_MODEL + 'tokens = { rate = "1000/day", burst = 900 }')
    create = client(weir).chat.completions.with_raw_response.create
    raw = create(model=MODEL, messages=MESSAGES, max_tokens=5)
    assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
    assert 0 < int(raw.headers["x-ratelimit-remaining-tokens"]) < 900
    assert raw.parse().usage.total_tokens > 0


def test_clients_are_known_by_their_keys_and_an_unknown_one_is_turned_away(client, start_simulator, start_weir):
    keys = "\n".join(f'[clients.{name}]\nkey = "sk-{name}"' for name in ["one", "two"])
    weir = start_weir(start_simulator(*QUICK), KNOWN_MODEL + keys)
    for name in ["one", "two"]:
        assert ask(client(weir, api_key=f"sk-{name}")).choices[0].message.content
        assert weir.metric("weir_requests_total", client=name, outcome="ok") == 1
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(client(weir, api_key="sk-three"))
    assert refused.value.code == "invalid_api_key"


def test_embeddings_come_back_one_for_each_input(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK))
    answer = client(weir).embeddings.create(model="text-embedding-3-small", input=["우산", "장화"])
    assert len(answer.data) == 2
    assert all(vector.embedding and isinstance(vector.embedding[0], float) for vector in answer.data)


def test_the_list_of_models_goes_through(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK))
    assert [model.id for model in client(weir).models.list()]


def test_the_asynchronous_client_calls_and_streams(start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK))

    async def calls():
        async with openai.AsyncOpenAI(base_url=weir.base_url, api_key="any") as client:
            plain = client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            words = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
            return await plain, [word for word in words if word]

    answer, words = asyncio.run(calls())
    assert answer.choices[0].message.content
    assert len(words) > 1


def test_the_sdk_speaks_http_2_where_it_is_told_to(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK))
    over_http_2 = client(weir, http_client=openai.DefaultHttpxClient(http1=False, http2=True))
    raw = over_http_2.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.http_response.http_version == "HTTP/2"
    assert raw.parse().choices[0].message.content
    assert len(list(ask(over_http_2, stream=True))) > 1


def test_the_tokens_in_the_metrics_are_those_the_client_was_told_of(client, start_simulator, start_weir):
    weir = start_weir(start_simulator(*QUICK), KNOWN_MODEL)
    sdk = client(weir)
    plain = ask(sdk).usage
    streamed = list(ask(sdk, stream=True, stream_options={"include_usage": True}))[-1].usage
    for kind, tokens in [
        ("prompt", plain.prompt_tokens + streamed.prompt_tokens),
        ("completion", plain.completion_tokens + streamed.completion_tokens),
    ]:
        wait_until(
            f"{tokens} {kind} tokens are counted",
            lambda: weir.metric("weir_tokens_total", model=MODEL, kind=kind) == tokens,
        )


def test_more_calls_than_slots_wait_their_turn_and_all_are_answered(gateway, start_weir):
    held_back = Stream(["네", "그럼요"], allowed=0)
    gateway.answers(held_back)
    weir = start_weir(gateway, "[limits]\nconcurrency = 4")

    async def calls():
        async with openai.AsyncOpenAI(base_url=weir.base_url, api_key="any") as client:

            async def words():
                stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
                return [chunk.choices[0].delta.content async for chunk in stream]

            tasks = [asyncio.create_task(words()) for _ in range(12)]
            await asyncio.to_thread(
                wait_until,
                "four are with the gateway, eight in the queue",
                lambda: gateway.in_flight == 4 and weir.metric("weir_waiting") == 8,
            )
            held_back.allowed = 2
            return await asyncio.gather(*tasks)

    assert asyncio.run(calls()) == [["네", "그럼요"]] * 12
    assert gateway.most_in_flight == 4
    weir.wait_until_idle()


# --- errors of the gateway


@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
    ],
)
def test_the_gateways_own_error_arrives_as_it_came_and_is_not_retried(status, exception, client, gateway, start_weir):
    gateway.answers(Answer(status, error("told you so", "invalid_request_error", "its_own_code")))
    weir = start_weir(gateway)
    with pytest.raises(exception) as raised:
        ask(client(weir))
    assert raised.value.status_code == status
    assert raised.value.body == error("told you so", "invalid_request_error", "its_own_code")["error"]
    assert len(gateway.calls) == 1


def test_a_billing_429_is_not_retried_by_weir(client, gateway, start_weir):
    gateway.answers(Answer(429, error("no money left", "insufficient_quota", "insufficient_quota")))
    weir = start_weir(gateway)
    with pytest.raises(openai.RateLimitError) as raised:
        ask(client(weir, max_retries=0))
    assert raised.value.code == "insufficient_quota"
    assert len(gateway.calls) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_retries_do_not_multiply_where_weir_has_given_up(stream, client, gateway, start_weir):
    gateway.answers(Answer(503, error("overloaded", code="its_own_code")))
    weir = start_weir(gateway, QUICK_RETRIES + "max_retries = 3")
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client(weir), stream=stream)
    assert raised.value.status_code == 503
    assert raised.value.code == "its_own_code"
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert raised.value.response.headers["x-weir-attempts"] == "4"
    assert len(gateway.calls) == 4


def test_a_connection_that_always_breaks_is_a_502_that_says_so(client, gateway, start_weir):
    gateway.answers(Reset())
    weir = start_weir(gateway, QUICK_RETRIES + "max_retries = 3")
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client(weir))
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_disconnected")
    assert len(gateway.calls) == 4


def test_a_gateway_that_is_not_there_is_a_502_that_says_so(client, start_weir):
    weir = start_weir(SimpleNamespace(base_url=f"http://127.0.0.1:{free_port()}/v1"), QUICK_RETRIES)
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client(weir))
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_unreachable")
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert weir.metric("weir_upstream_attempts_total", result="connect_error") == 4


# --- weir's own refusals


def test_a_refusal_for_the_quota_is_a_rate_limit_error_that_says_when_to_come_back(client, gateway, start_weir):
    weir = start_weir(gateway, '[limits]\nrequests = { rate = "1/min", burst = 1 }\n[queue]\nmax_wait = "1s"\n')
    sdk = client(weir, max_retries=0)
    ask(sdk)
    with pytest.raises(openai.RateLimitError) as raised:
        ask(sdk)
    refusal = raised.value
    assert (refusal.type, refusal.code) == ("requests", "rate_limit_exceeded")
    headers = refusal.response.headers
    assert "requests" in headers["x-weir-refused-by"]
    assert int(headers["retry-after"]) == math.ceil(int(headers["retry-after-ms"]) / 1000)
    assert 50 <= int(headers["retry-after"]) <= 70
    assert len(gateway.calls) == 1
    assert weir.metric("weir_refused_total") == 1


def test_the_sdk_comes_back_when_told_to_and_is_served(client, gateway, start_weir):
    weir = start_weir(gateway, '[limits]\nrequests = { rate = "30/min", burst = 1 }\n[queue]\nmax_wait = "200ms"\n')
    sdk = client(weir)
    ask(sdk)
    ask(sdk)
    assert [call.header("x-stainless-retry-count") for call in gateway.calls] == ["0", "1"]
    assert weir.metric("weir_refused_total") == 1


# --- clients that leave, gateways that hang


def test_a_client_that_leaves_its_stream_gives_back_the_slot(client, start_simulator, start_weir):
    simulator = start_simulator("--first-token", "5ms", "--per-token", "60s")
    weir = start_weir(simulator, f'[models."{MODEL}"]\nconcurrency = 1\n')
    sdk = client(weir)
    with ask(sdk, stream=True) as stream:
        next(iter(stream))
        assert weir.metric("weir_in_flight", model=MODEL) == 1
        assert simulator.stats()["in_flight"] == 1

    wait_until("the slot is back", lambda: weir.metric("weir_in_flight", model=MODEL) == 0)
    simulator.wait_until_idle()
    assert weir.metric("weir_client_disconnects_total", phase="stream") == 1
    # There is one slot, so the next stream begins only if it is really free.
    with ask(sdk, stream=True) as stream:
        assert next(iter(stream)).id


def test_a_client_that_does_not_wait_for_the_answer_gives_back_the_slot(client, gateway, start_weir):
    gateway.answers(Stall(), Answer(body=completion("네")))
    weir = start_weir(gateway, f'[models."{MODEL}"]\nconcurrency = 1\n')
    sdk = client(weir, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        ask(sdk, timeout=0.5)

    weir.wait_until_idle()
    gateway.wait_until_idle()
    assert weir.metric("weir_client_disconnects_total", phase="upstream") == 1
    assert ask(sdk).choices[0].message.content == "네"


@pytest.mark.parametrize(
    ("stream", "reaction", "limit", "code"),
    [
        (False, Stall(), "response", "response_timeout"),
        (True, Stall(), "first_event", "first_event_timeout"),
        (True, Stream(["nie"], allowed=0), "first_event", "first_event_timeout"),
    ],
    ids=["no answer", "no stream", "a stream without an event"],
)
def test_a_gateway_that_hangs_is_a_504_after_one_retry(stream, reaction, limit, code, client, gateway, start_weir):
    gateway.answers(reaction)
    weir = start_weir(gateway, QUICK_RETRIES + f'[timeouts]\n{limit} = "300ms"\n')
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client(weir), stream=stream)
    assert (raised.value.status_code, raised.value.type, raised.value.code) == (504, "timeout", code)
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert len(gateway.calls) == 2
    weir.wait_until_idle()
    gateway.wait_until_idle()
