"""The programs of examples/python: each runs to its end and sees none of the gateway's failures."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from gateway import Answer, Call, Reaction, Reset, Stream, completion, error
from harness import BAD_DAY, PATIENT, ROOT, run

EXAMPLES = sorted((ROOT / "examples" / "python").glob("*.py"))
USUAL_CLIENTS = sorted((Path(__file__).parent / "tutorial").glob("*.py"))
PROGRAMS = [pytest.param(program, id=program.stem) for program in EXAMPLES + USUAL_CLIENTS]


def test_every_example_and_every_usual_client_is_here():
    assert [program.stem for program in EXAMPLES] == ["batch", "customer_service", "gather", "openai_sdk", "resilient"]
    assert [program.stem for program in USUAL_CLIENTS] == ["backoff", "gathered", "semaphore", "support_desk"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_succeeds_through_weir_on_the_gateways_bad_day(program, start_simulator, start_weir):
    simulator = start_simulator(*BAD_DAY)
    weir = start_weir(simulator, PATIENT)

    assert run(sys.executable, program, base_url=weir.base_url).returncode == 0
    assert weir.metric("weir_requests_total", outcome="ok") == weir.metric("weir_requests_total") > 0
    weir.wait_until_idle()
    simulator.wait_until_idle()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_succeeds_though_each_first_attempt_fails(program, gateway, start_weir):
    attempts: Counter[bytes] = Counter()
    failures = [
        Answer(503, error("try later")),
        Answer(429, error("slow down", "requests", "rate_limit_exceeded"), [("retry-after-ms", "20")]),
        Reset(),
    ]

    def fail_once(call: Call) -> Reaction:
        attempts[call.body] += 1
        if attempts[call.body] == 1:
            return failures[len(attempts) % len(failures)]
        return Stream(["네", "!"], allowed=2) if call.json().get("stream") else Answer(body=completion())

    gateway.react = fail_once
    weir = start_weir(gateway, PATIENT)

    assert run(sys.executable, program, base_url=weir.base_url).returncode == 0
    assert set(attempts.values()) == {2}
    assert weir.metric("weir_requests_total", outcome="ok") == len(attempts)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_by_its_exit_status_that_a_prompt_failed(program, gateway, start_weir):
    gateway.answers(Answer(400, error("no such thing", "invalid_request_error")))
    weir = start_weir(gateway)

    done = run(sys.executable, program, base_url=weir.base_url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
