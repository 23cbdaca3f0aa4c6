"""A weir that is replaced while the OpenAI SDK is at work, its retries off: the next weir is started on the same sockets, then
the old one is told to stop, as docs/operations.md says under "Without a gap".
"""

import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import openai

from harness import DEADLINE, WEIR, Process, config_with, get, listening, wait_until

MODEL = "gpt-4.1-mini"
REPLACEMENTS = 3
# More than may be under way at once, so that some always wait while weir is replaced.
WORKERS = 12
# An answer takes some tenths of a second: each replacement meets many in the middle.
UNHURRIED = ("--first-token", "50ms", "--per-token", "10ms", "--output", "5..40")
CONFIG = f'[server]\ndrain = "{DEADLINE:.0f}s"\n[limits]\nconcurrency = 8\n'


# Puts two sockets where a service manager does, and becomes the command.
HAND_OVER = """
import fcntl, os, sys
descriptors = [int(number) for number in sys.argv[1:3]]
copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in descriptors]
for descriptor in descriptors:
    os.set_inheritable(descriptor, False)
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "listen:admin"}
os.execv(sys.argv[3], sys.argv[3:])
"""


class Sockets:
    """What a service manager holds: a socket for clients and one for operators."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        clients, operators = (stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512)) for _ in "12")
        self.base_url = f"http://127.0.0.1:{clients.getsockname()[1]}/v1"
        self.admin_url = f"http://127.0.0.1:{operators.getsockname()[1]}"
        self.descriptors = (clients.fileno(), operators.fileno())

    def serve(self, config: Path) -> Process:
        """A weir that serves at these sockets."""
        command = ("-c", HAND_OVER, *map(str, self.descriptors), WEIR, "serve", "--config", config)
        weir = Process(*command, program=sys.executable, descriptors=self.descriptors)
        self.stack.callback(weir.end)
        weir.wait_until("it says where it listens", lambda: listening(weir.log))
        return weir


def answered(weir: Process) -> int:
    """How many requests it has answered in full, by its access log."""
    count = 0
    for line in list(weir.log):
        with suppress(json.JSONDecodeError):
            count += json.loads(line).get("outcome") == "ok"
    return count


class Batch:
    """Requests one after the other by each of its workers until told to stop: streams and others in turn."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.client = client
        self.stopped = threading.Event()

    def work(self, worker: int) -> int:
        """How many were answered. The first that was not ends it."""
        done = 0
        while not self.stopped.is_set():
            messages = [{"role": "user", "content": f"후기 {worker}-{done}: 배송이 빨라요."}]
            if (worker + done) % 2:
                chunks = list(self.client.chat.completions.create(model=MODEL, messages=messages, stream=True))
                finished = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
            else:
                answer = self.client.chat.completions.create(model=MODEL, messages=messages)
                finished = answer.choices[0].finish_reason
            assert finished == "stop", f"request {worker}-{done} ended with {finished}"
            done += 1
        return done


def test_no_request_fails_while_weir_is_replaced_on_its_sockets(stack, start_simulator, tmp_path: Path):
    simulator = start_simulator(*UNHURRIED)
    config = tmp_path / "weir.toml"
    config.write_text(config_with(simulator.base_url, CONFIG), encoding="utf-8")
    sockets = Sockets(stack)
    weirs = [sockets.serve(config)]
    batch = Batch(stack.enter_context(openai.OpenAI(base_url=sockets.base_url, api_key="any", max_retries=0)))
    with ThreadPoolExecutor(WORKERS) as pool:
        workers = [pool.submit(batch.work, worker) for worker in range(WORKERS)]
        try:
            for _ in range(REPLACEMENTS):
                old = weirs[-1]
                old.wait_until("it is at work", lambda weir=old: answered(weir) >= WORKERS)
                weirs.append(sockets.serve(config))
                wait_until("requests are under way", lambda: simulator.stats()["in_flight"] > 0)
                before = answered(old)
                old.end()
                assert answered(old) > before, "nothing was under way when it was told to stop"
                assert get(f"{sockets.admin_url}/readyz") == (200, "ready\n")
            weirs[-1].wait_until("the last one is at work", lambda: answered(weirs[-1]) >= WORKERS)
        finally:
            batch.stopped.set()
        done = sum(worker.result(DEADLINE) for worker in workers)
    weirs[-1].end()
    assert done == sum(map(answered, weirs))
