"""deploy/prometheus and deploy/grafana before a real Prometheus, which scrapes real weirs."""

import importlib.util
import json
import math
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import yaml

from gateway import Answer, Call, Gateway, Reaction, Stream, completion, error, running_gateway
from harness import (
    QUICK,
    ROOT,
    Prometheus,
    Weir,
    running_prometheus,
    running_simulator,
    running_weir,
    samples,
    tool,
    wait_until,
)

RULES = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"

# What stays at nothing in the traffic below, though it is there. Everything else has to show something. (CPU time is
# told in whole seconds.)
QUIET = {"Breaker", "CPU", "Lost", "Stopping"}

# What may be there and gone again, so that it is looked for in the last two minutes.
FLEETING = {"Learned quotas"}


def dashboard_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", GRAFANA / "dashboard.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards/weir.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = [variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]


def substituted(expression: str) -> str:
    """What Grafana sends: everything chosen, and rates over half a minute."""
    for name, value in {"$job": "weir", "$__rate_interval": "30s"}.items():
        expression = expression.replace(name, value)
    expression = re.sub(r"\$(instance|model|client)\b", ".*", expression)
    assert "$" not in expression, f"{expression} has a variable that this test does not know"
    return expression


# --- the traffic


@dataclass
class World:
    prometheus: Prometheus
    # Before a simulated gateway on a bad day.
    steady: Weir
    # Before a gateway that does as the prompt says, where requests are held up.
    held: Weir


STEADY = """
[limits]
requests = "60000/min"
tokens = "60000000/min"
[models.watched]
requests = { rate = "1/h", burst = 1 }
mode = "observe"
[clients.bot]
key = "bot"
tokens = "6000000/min"
[clients.batch]
key = "batch"
requests = { rate = "1/h", burst = 2 }
max_wait = "1s"
[retry]
max_retries = 1
base_delay = "10ms"
budget = 1.0
"""

HELD = """
max_retries = 0
[server]
max_body = "1KiB"
[limits]
tokens = "600000/min"
[models.held]
concurrency = 1
"""


def react(call: Call) -> Reaction:
    match call.json()["messages"][0]["content"]:
        case "hold":
            return Stream(["one", "two"], allowed=1)
        case "cool":
            return Answer(429, error("not now", "requests"), [("retry-after", "100")])
        case "fail":
            return Answer(500, error("no"))
        case _:
            return Answer(body=completion())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two weirs after traffic of every kind, as Prometheus has seen it. The events come twice, each time with a scrape
    behind them, so that every counter is seen to rise; what is held up stays so until the tests are done."""
    with ExitStack() as stack:
        steady, held = weirs(stack, tmp_path_factory.mktemp("weirs"))
        addresses = [weir.admin_url.removeprefix("http://") for weir in (steady, held)]
        prometheus = stack.enter_context(running_prometheus(tmp_path_factory.mktemp("prometheus"), config_for(addresses)))
        world = World(prometheus, steady, held)
        for cool in ["later", "cool"]:
            chats(steady, "batch", "small", 2)
            chats(steady, "bot", "small", 40)
            chats(steady, "bot", "watched", 2)
            chats(held, "any", "cold", 1, cool)
            chats(held, "any", "broken", 3, "fail")
            too_long(held)
            reload(held)
            until_scraped(world)
        learn(world)
        hold_up(held, stack)
        until_scraped(world)
        yield world


def weirs(stack: ExitStack, directory: Path) -> tuple[Weir, Weir]:
    # Told in headers, and not reached.
    quota = ["--requests", "600/min", "--requests-burst", "200", "--tokens", "6000/min", "--tokens-burst", "8000"]
    faults = [f"--fault={name}=0.12" for name in ("503", "429-retry-after-ms", "reset-before-answer")]
    simulator = stack.enter_context(
        running_simulator(*QUICK, *quota, "--output", "3..9", "--seed", "7", "--fault-hint", "20ms", *faults)
    )
    gateway: Gateway = stack.enter_context(running_gateway())
    gateway.react = react
    places = []
    for name, upstream, config in [("steady", simulator, STEADY), ("held", gateway, "[retry]" + HELD)]:
        (directory / name).mkdir()
        places.append(stack.enter_context(running_weir(directory / name, upstream.base_url, config)))
    return places[0], places[1]


def config_for(addresses: list[str]) -> dict[str, Any]:
    """The shipped configuration, with these addresses in place of its own, and in a hurry."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": addresses}]
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(RULES / pattern) for pattern in config["rule_files"]]
    return config


def chats(weir: Weir, key: str, model: str, count: int, prompt: str = "hello") -> None:
    """One after the other, every other one a stream: a seeded simulator does the same each time."""
    with openai.OpenAI(base_url=weir.base_url, api_key=key, max_retries=0) as client:
        for number in range(count):
            call = {"model": model, "messages": [{"role": "user", "content": prompt}]}
            try:
                if number % 2:
                    list(client.chat.completions.create(**call, stream=True))
                else:
                    client.chat.completions.create(**call)
            except openai.APIError:
                # Refusals and faults are what is wanted.
                pass


def too_long(weir: Weir) -> None:
    chats(weir, "any", "cold", 1, "x" * 2000)


def reload(weir: Weir) -> None:
    before = weir.metric("weir_reloads_total", result="applied")
    weir.process.child.send_signal(signal.SIGHUP)
    wait_until("it has reloaded", lambda: weir.metric("weir_reloads_total", result="applied") == before + 1)


def learn(world: World) -> None:
    """Until Prometheus has seen what weir has learned, which may have been forgotten since: a bucket is full again."""
    metrics = ("weir_learned_requests_per_second", "weir_learned_tokens_per_second")

    def seen() -> bool:
        chats(world.steady, "bot", "small", 4)
        return all(world.prometheus.query(f"last_over_time({metric}[1m])") for metric in metrics)

    wait_until("Prometheus sees what weir has learned", seen)


def hold_up(weir: Weir, stack: ExitStack) -> None:
    """One streams, one waits for it, and one more has left. Another waits until its model's gateway wants to be asked again."""
    send(weir, stack, stream=True)
    wait_until("it streams", lambda: weir.metric("weir_in_flight", model="held") == 1)
    send(weir, stack)
    wait_until("another waits", lambda: weir.metric("weir_waiting", model="held") == 1)
    leaver = send(weir, stack)
    wait_until("one more waits", lambda: weir.metric("weir_waiting", model="held") == 2)
    leaver.close()
    wait_until("it has left", lambda: weir.metric("weir_client_disconnects_total", phase="queue") == 1)
    send(weir, stack, model="cold")
    wait_until("it waits for the gateway", lambda: weir.metric("weir_learned_waiting", model="cold") == 1)


def send(weir: Weir, stack: ExitStack, model: str = "held", stream: bool = False) -> socket.socket:
    """A request whose answer nobody reads."""
    host, port = weir.origin.removeprefix("http://").split(":")
    connection = stack.enter_context(socket.create_connection((host, int(port))))
    body = json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "hold"}]})
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer any\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}".encode()
    )
    return connection


def until_scraped(world: World) -> None:
    """Until both weirs have been scraped, and the rules evaluated, after what has happened so far."""
    now = time.time()

    def scraped() -> bool:
        times = [value for _, value in world.prometheus.query("timestamp(weir_build_info)")]
        return len(times) == 2 and min(times) > now

    wait_until("Prometheus has scraped both weirs", scraped)


# --- the rules


def test_promtool_finds_nothing_wrong_with_the_configuration_and_the_rules():
    promtool("check", "config", RULES / "prometheus.yml")
    promtool("check", "rules", *RULES.glob("*.rules.yml"))


def test_promtool_takes_the_scrape_configuration_of_the_readme(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(block, encoding="utf-8")
    promtool("check", "config", tmp_path / "prometheus.yml")
    assert yaml.safe_load(block)["scrape_configs"][0]["job_name"] == "weir", "the rules know weir by it"


@pytest.mark.parametrize("file", sorted(RULES.glob("*.test.yml")), ids=lambda file: file.name)
def test_each_alert_fires_when_it_should_and_is_silent_when_it_should_not(file):
    promtool("test", "rules", file)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules("alerts.rules.yml") if "alert" in rule]


def rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    tests = [yaml.safe_load(file.read_text(encoding="utf-8"))["tests"] for file in RULES.glob("*.test.yml")]
    cases = [case for test in chain(*tests) for case in test["alert_rule_test"]]
    for alert in alerts():
        own = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert["alert"]]
        assert True in own and False in own, f"{alert['alert']} lacks a case"


def test_each_alert_says_how_bad_it_is_and_where_to_read_on():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/operations.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for alert in alerts():
        name, notes = alert["alert"], alert["annotations"]
        assert alert["labels"]["severity"] in ("critical", "warning", "info"), name
        assert notes["summary"] and notes["description"], name
        assert notes["runbook"] == f"docs/operations.md#{name.lower()}", name
        assert name.lower() in anchors, f"docs/operations.md has no section {name}"


def test_a_real_prometheus_evaluates_every_rule(world):
    def evaluated() -> list[dict[str, Any]] | None:
        found = [rule for group in world.prometheus.api("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else None

    found = wait_until("every rule is evaluated", evaluated)
    assert {rule["name"] for rule in found} == {
        rule.get("alert") or rule["record"] for file in ("recording.rules.yml", "alerts.rules.yml") for rule in rules(file)
    }
    assert [rule for rule in found if rule["health"] != "ok"] == []


def test_a_quantile_is_compared_with_a_bound_of_its_buckets(world):
    """Within a bucket a quantile is interpolated: it would say more of the rank than of the time."""
    bounds: dict[str, set[float]] = {}
    for sample in samples(world.steady.metrics()):
        if "le" in sample.labels:
            bounds.setdefault(sample.name.removesuffix("_bucket"), set()).add(float(sample.labels["le"]))
    compared = [
        (metric, float(threshold))
        for alert in alerts()
        for metric, threshold in re.findall(r":(weir_\w+):p\d+_rate\w+\s*>\s*([\d.]+)(?![\d.]|\s*\*)", alert["expr"])
    ]
    assert len(compared) == 3
    assert [(metric, threshold) for metric, threshold in compared if threshold not in bounds[metric]] == []


@pytest.mark.parametrize("name", [rule["record"] for rule in rules("recording.rules.yml")])
def test_a_recording_rule_records_something(world, name):
    wait_until(name, lambda: world.prometheus.query(name))


# --- the dashboard


def test_the_dashboard_is_what_its_script_writes():
    written = (GRAFANA / "dashboards/weir.json").read_text(encoding="utf-8")
    assert written == dashboard_maker().text(), "run deploy/grafana/dashboard.py"


def test_the_panels_lie_side_by_side():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_each_panel_says_what_it_shows_and_in_which_unit():
    for panel in PANELS:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_of_a_panel_returns_data(world, panel):
    for target in panel["targets"]:
        expression = substituted(target["expr"])
        if panel["title"] in FLEETING:
            expression = f"last_over_time(({expression})[2m:500ms])"
        found = world.prometheus.query(expression)
        values = [value for _, value in found if math.isfinite(value)]
        assert values, f"{expression} returns nothing, or no number: {found}"
        if panel["title"] not in QUIET:
            assert any(values), f"{expression} is 0 throughout, so this test does not show that it sees anything"
        # A legend that names a label which is not there shows nothing.
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert any(label in labels for labels, _ in found), f"{expression} has no label {label}"


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable["name"])
def test_a_variable_offers_the_values_that_there_are(world, variable):
    series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
    values = world.prometheus.api(f"label/{label}/values", **{"match[]": substituted(series)})
    expected = {
        "job": {"weir"},
        "instance": {weir.admin_url.removeprefix("http://") for weir in (world.steady, world.held)},
        "model": {"small", "watched", "held", "cold"},
        "client": {"-", "bot", "batch"},
    }
    assert expected[variable["name"]] <= set(values)


def test_the_annotation_is_a_query(world):
    for annotation in DASHBOARD["annotations"]["list"]:
        world.prometheus.query(substituted(annotation["expr"]))
