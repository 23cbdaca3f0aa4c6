#!/usr/bin/env python3
"""Writes dashboards/weir.json, the dashboard that Grafana loads. Change it here, then run this; a test compares the two.

Every panel says in its description what to make of it. Its queries take a job, instances, models and clients from the
dashboard's variables. tests/clients/test_prometheus.py runs each of them.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboards") / "weir.json"

# What the queries of a panel are narrowed to: a weir, and where a metric has them its model and client.
WEIR = 'job=~"$job", instance=~"$instance"'
MODEL = f'{WEIR}, model=~"$model"'
PAIR = f'{MODEL}, client=~"$client"'
RATE = "[$__rate_interval]"

PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8

# Units of Grafana's: it puts k and M before these.
TOKENS, TOKENS_PER_SECOND, PER_MINUTE, COUNTS_PER_SECOND = "si:tok", "si:tok/s", "si:/min", "cps"


def rate(metric: str, selector: str, by: str = "") -> str:
    """Per second, summed."""
    grouping = f"by ({by}) " if by else ""
    return f"sum {grouping}(rate({metric}{{{selector}}}{RATE}))"


def quantile(share: float, metric: str, selector: str, by: str = "model") -> str:
    """Nothing, where nothing was measured: as not a number it would leave its whole panel empty."""
    grouping = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({grouping}) (rate({metric}_bucket{{{selector}}}{RATE}))) >= 0"


class Panel:
    """A panel; `queries` are (expression, legend)."""

    def __init__(
        self,
        title: str,
        about: str,
        *queries: tuple[str, str],
        unit: str = "short",
        kind: str = "timeseries",
        width: int = 8,
        stack: bool = False,
        colors: dict[str, str] | None = None,
        steps: list[tuple[float | None, str]] | None = None,
        most: float | None = None,
        least: float | None = 0,
        nothing: str | None = None,
        least_first: bool = False,
        words: dict[int, str] | None = None,
        others: list[dict[str, Any]] | None = None,
    ):
        self.title, self.about, self.queries = title, about, queries
        self.unit, self.kind, self.width, self.stack = unit, kind, width, stack
        self.colors, self.steps, self.most, self.least = colors or {}, steps, most, least
        self.least_first = least_first
        # What it says where there is no data, what it says for a number, and series that look different.
        self.nothing, self.words, self.others = nothing, words or {}, others or []

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        instant = self.kind in ("stat", "bargauge")
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": PROMETHEUS,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height()},
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": PROMETHEUS,
                    "expr": expression,
                    "legendFormat": legend,
                    "instant": instant,
                    "range": not instant,
                }
                for index, (expression, legend) in enumerate(self.queries)
            ],
            "fieldConfig": {"defaults": self.defaults(), "overrides": self.overrides()},
            "options": self.options(),
        }

    def height(self) -> int:
        return 4 if self.kind == "stat" and self.width < 8 else HEIGHT

    def overrides(self) -> list[dict[str, Any]]:
        limits = [LIMIT] if any(legend.endswith(", limit") for _, legend in self.queries) else []
        return [color(*it) for it in self.colors.items()] + limits + self.others

    def defaults(self) -> dict[str, Any]:
        steps = self.steps or [(None, "blue" if self.kind == "stat" else "green")]
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "min": self.least,
            "max": self.most,
            "noValue": self.nothing,
            "mappings": [{"type": "value", "options": {str(n): {"text": word} for n, word in self.words.items()}}]
            if self.words
            else None,
            # A half of "open" is no tick of an axis.
            "decimals": 0 if self.words else None,
            "color": {"mode": "palette-classic" if self.kind == "timeseries" else "thresholds"},
            "thresholds": {"mode": "absolute", "steps": [{"value": value, "color": name} for value, name in steps]},
        }
        if self.kind == "timeseries":
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 60 if self.stack else 5,
                "stacking": {"mode": "normal" if self.stack else "none", "group": "A"},
                "showPoints": "never",
                # A gap of a scrape or two is no end.
                "spanNulls": 120000,
            }
            if self.steps:
                defaults["custom"]["thresholdsStyle"] = {"mode": "dashed"}
        return {key: value for key, value in defaults.items() if value is not None}

    def options(self) -> dict[str, Any]:
        last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        if self.kind == "stat":
            # Shares of red where thresholds say so; else a plain number.
            text = "auto" if self.width < 8 else "value_and_name"
            return {"reduceOptions": last, "colorMode": "value", "graphMode": "none", "textMode": text}
        if self.kind == "bargauge":
            return {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic", "showUnfilled": True}
        return {
            # What matters comes first: a legend has room for three rows or so.
            "legend": {
                "showLegend": True,
                "displayMode": "table",
                "placement": "bottom",
                "calcs": ["lastNotNull", "max"],
                "sortBy": "Last *",
                "sortDesc": not self.least_first,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


def color(name: str, fixed: str) -> dict[str, Any]:
    """The series of this name has this colour, whatever others there are."""
    properties = [{"id": "color", "value": {"mode": "fixed", "fixedColor": fixed}}]
    return {"matcher": {"id": "byName", "options": name}, "properties": properties}


# What is a bound, and not a part of what is drawn.
LIMIT = {
    "matcher": {"id": "byRegexp", "options": "/, limit$/"},
    "properties": [
        {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [10, 10]}},
        {"id": "custom.fillOpacity", "value": 0},
    ],
}

# There are a thousand times as many tokens as requests.
TOKENS_AT_THE_RIGHT = {
    "matcher": {"id": "byRegexp", "options": "/tokens$/"},
    "properties": [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": "si:tok/min"}],
}

# Beside seconds, a yes or no.
LAST_ONE = {
    "matcher": {"id": "byRegexp", "options": "/: the last one$/"},
    "properties": [
        {"id": "unit", "value": "bool_yes_no"},
        {"id": "color", "value": {"mode": "thresholds"}},
        {"id": "thresholds", "value": {"mode": "absolute", "steps": [{"value": None, "color": "red"}, {"value": 1, "color": "green"}]}},
    ],
}

OUTCOMES = {
    "ok": "green",
    "client_error": "yellow",
    "refused": "orange",
    "upstream_error": "red",
    "failed": "dark-red",
    "disconnected": "gray",
}
RESULTS = {
    "ok": "green",
    "429": "orange",
    "4xx": "yellow",
    "5xx": "red",
    "connect_error": "dark-red",
    "reset": "semi-dark-red",
    "timeout": "purple",
    "stream_error": "light-red",
    "cancelled": "gray",
}
BAD = [(None, "green"), (0.01, "orange"), (0.05, "red")]
FULL = [(None, "green"), (0.5, "orange"), (0.9, "red")]
ALL_REQUESTS = rate("weir_requests_total", PAIR)
FAULTLESS = rate("weir_requests_total", PAIR + ', outcome!~"client_error|disconnected"')
ATTEMPTS = rate("weir_upstream_attempts_total", MODEL, "model")

# The global limits have no name.
LIMIT_LEGEND = "{{scope}} {{name}} {{unit}}"


def who_waits(metric: str, selector: str, by: str) -> str:
    """Now, by what they wait for; only what somebody has waited for within the hour."""
    series = f"{metric}{{{selector}}}"
    return f"sum by ({by}) ({series}) and sum by ({by}) (max_over_time({series}[1h])) > 0"


OVERVIEW = [
    Panel(
        "weirs up",
        "How many Prometheus reaches.",
        (f"sum(up{{{WEIR}}})", ""),
        kind="stat",
        width=2,
        steps=[(None, "red"), (1, "green")],
        nothing="none",
    ),
    Panel("Requests", "Requests that ended, a second.", (ALL_REQUESTS, ""), unit="reqps", kind="stat", width=3),
    Panel(
        "Errors",
        "The gateway's errors and requests without its answer, of all but those that were their client's fault or were left.",
        (rate("weir_requests_total", PAIR + ', outcome=~"failed|upstream_error"') + f" / ({FAULTLESS} > 0)", ""),
        unit="percentunit",
        kind="stat",
        width=3,
        steps=BAD,
        nothing="no requests",
    ),
    Panel(
        "Refused",
        "What weir refused, of all requests. Whose limit it was: the panel below, by reason.",
        (rate("weir_refused_total", PAIR) + f" / ({ALL_REQUESTS} > 0)", ""),
        unit="percentunit",
        kind="stat",
        width=3,
        steps=BAD,
        nothing="no requests",
    ),
    Panel("In flight", "Requests that hold a slot now.", (f"sum(weir_in_flight{{{MODEL}}})", ""), kind="stat", width=3),
    Panel(
        "Waiting, for whom",
        "Requests in the queue now: for a limit of weir's configuration, or for the gateway (what weir has learned of it, or was "
        "told). Whose limit it is: the panel below.",
        (f"sum(weir_limit_waiting{{{WEIR}}})", "weir's limits"),
        (f"sum(weir_learned_waiting{{{MODEL}}})", "the gateway"),
        kind="stat",
        width=4,
    ),
    Panel(
        "Wait, p95",
        "One in twenty attempts waits so long for its permit, or until it is refused.",
        (quantile(0.95, "weir_queue_wait_seconds", MODEL, ""), ""),
        unit="s",
        kind="stat",
        width=3,
        nothing="none lately",
        steps=[(None, "green"), (10, "orange"), (30, "red")],
    ),
    Panel(
        "First token, p95",
        "One in twenty streams waits so long for the gateway's first output.",
        (quantile(0.95, "weir_time_to_first_token_seconds", MODEL, ""), ""),
        unit="s",
        kind="stat",
        width=3,
        nothing="none lately",
    ),
    Panel(
        "Requests by outcome",
        "How requests ended for their clients. refused: by weir. upstream_error: the gateway's own error, passed on. "
        "failed: no answer of the gateway's. disconnected: the client left first.",
        (rate("weir_requests_total", PAIR, "outcome"), "{{outcome}}"),
        unit="reqps",
        stack=True,
        colors=OUTCOMES,
    ),
    Panel(
        "Waiting, by whose limit",
        "Where the queue stands. A limit by its scope, name and unit is weir's configuration: raise it, or send less. gateway is "
        "what weir has learned of it or was told (a quota, a cool-down, the breaker, adaptive slots): nothing to change in weir. "
        "A request waits for one limit at a time; behind it there may be others.",
        (who_waits("weir_limit_waiting", WEIR, "scope, name, unit"), LIMIT_LEGEND),
        (who_waits("weir_learned_waiting", MODEL, "model"), "gateway: {{model}}"),
        stack=True,
        nothing="nobody has waited",
    ),
    Panel(
        "Refused by reason",
        "requests, tokens, concurrency: a limit of weir's own configuration. queue: the queue or the memory is full. "
        "breaker: the gateway is given up. drain: weir stops.",
        (rate("weir_refused_total", PAIR, "reason"), "{{reason}}"),
        unit="reqps",
        stack=True,
    ),
    Panel(
        "In flight against limit",
        "What is under way, and what may be: where slots are adaptive, as much as the gateway has been found to take.",
        (f"sum by (model) (weir_in_flight{{{MODEL}}})", "{{model}}"),
        (f"sum by (model) (weir_concurrency_limit{{{MODEL}}})", "{{model}}, limit"),
    ),
    Panel(
        "Waiting, by model",
        "Requests in the queue. They wait for a slot, a quota or the end of a cool-down: the panel above tells which.",
        (f"sum by (model) (weir_waiting{{{MODEL}}})", "{{model}}"),
        stack=True,
    ),
    Panel(
        "Clients that left",
        "Before their answer was whole, by how far it had come. In the queue: their patience is shorter than queue.max_wait.",
        (rate("weir_client_disconnects_total", WEIR, "phase"), "{{phase}}"),
        unit="reqps",
        stack=True,
    ),
]

MODELS = [
    Panel(
        "Whole request",
        "From a request's head to the last byte of its answer, waiting and retries included.",
        (quantile(0.5, "weir_request_duration_seconds", MODEL), "{{model}}, p50"),
        (quantile(0.95, "weir_request_duration_seconds", MODEL), "{{model}}, p95"),
        (quantile(0.99, "weir_request_duration_seconds", MODEL), "{{model}}, p99"),
        unit="s",
    ),
    Panel(
        "One attempt",
        "The model's own latency, from sending an attempt to its end.",
        (quantile(0.5, "weir_upstream_duration_seconds", MODEL), "{{model}}, p50"),
        (quantile(0.95, "weir_upstream_duration_seconds", MODEL), "{{model}}, p95"),
        unit="s",
    ),
    Panel(
        "Waiting in the queue",
        "How long an attempt waited for its permit, or until it was refused.",
        (quantile(0.5, "weir_queue_wait_seconds", MODEL), "{{model}}, p50"),
        (quantile(0.95, "weir_queue_wait_seconds", MODEL), "{{model}}, p95"),
        unit="s",
    ),
    Panel(
        "Time to first token",
        "Of streams, from sending the attempt that answered to its first output.",
        (quantile(0.5, "weir_time_to_first_token_seconds", MODEL), "{{model}}, p50"),
        (quantile(0.95, "weir_time_to_first_token_seconds", MODEL), "{{model}}, p95"),
        unit="s",
    ),
    Panel(
        "Time per output token",
        "Of streams, the mean of the tokens after the first.",
        (quantile(0.5, "weir_time_per_output_token_seconds", MODEL), "{{model}}, p50"),
        (quantile(0.95, "weir_time_per_output_token_seconds", MODEL), "{{model}}, p95"),
        unit="s",
    ),
    Panel(
        "Attempts by result",
        "Attempts at the gateway. A few 429s are how weir finds the gateway's limits; many say that the configured ones "
        "are too high.",
        (rate("weir_upstream_attempts_total", MODEL, "result"), "{{result}}"),
        unit="reqps",
        stack=True,
        colors=RESULTS,
    ),
    Panel(
        "Attempts that failed or were refused",
        "Of all attempts, by model.",
        (
            rate("weir_upstream_attempts_total", MODEL + ', result!~"ok|4xx|429|cancelled"', "model") + f" / ({ATTEMPTS} > 0)",
            "{{model}}, failed",
        ),
        (
            rate("weir_upstream_attempts_total", MODEL + ', result="429"', "model") + f" / ({ATTEMPTS} > 0)",
            "{{model}}, refused",
        ),
        unit="percentunit",
    ),
    Panel(
        "Retries by reason",
        "Attempts that were made again, by how the one before had ended: faults that clients did not see.",
        (rate("weir_retries_total", MODEL, "reason"), "{{reason}}"),
        unit="reqps",
        stack=True,
        colors=RESULTS,
    ),
    Panel(
        "Tokens",
        "As the gateway counts them. cached is part of prompt, reasoning part of completion.",
        (rate("weir_tokens_total", PAIR, "model, kind"), "{{model}}, {{kind}}"),
        unit=TOKENS_PER_SECOND,
    ),
]

LIMITS = [
    Panel(
        "Left of each limit",
        "What remains of a bucket's burst, or of the slots; the twenty with least. At nothing, requests wait for it.",
        (
            f"bottomk(20, min by (scope, name, unit) (weir_limit_remaining{{{WEIR}}} / (weir_limit_capacity{{{WEIR}}} > 0)))",
            LIMIT_LEGEND,
        ),
        unit="percentunit",
        kind="bargauge",
        most=1,
        steps=[(None, "red"), (0.1, "orange"), (0.5, "green")],
    ),
    Panel(
        "Left of each limit, over time",
        "The same. One that stays at the bottom is the one that requests wait for.",
        (
            f"min by (scope, name, unit) (weir_limit_remaining{{{WEIR}}} / (weir_limit_capacity{{{WEIR}}} > 0))",
            LIMIT_LEGEND,
        ),
        unit="percentunit",
        most=1,
        width=16,
        least_first=True,
    ),
    Panel(
        "Quotas of the configuration",
        "What comes back to each limit, a minute, of all weirs together.",
        (
            f"60 * sum by (scope, name, unit) (weir_limit_refill_per_second{{{WEIR}}})",
            LIMIT_LEGEND,
        ),
        unit=PER_MINUTE,
        others=[TOKENS_AT_THE_RIGHT],
    ),
    Panel(
        "Slots",
        "How many of a model's requests may be under way, in each weir. Where slots are adaptive they follow the gateway.",
        (f"weir_concurrency_limit{{{MODEL}}}", "{{instance}}: {{model}}"),
    ),
    Panel(
        "Would be refused",
        "What limits in observe mode would have refused. Enforce them when this is what you meant.",
        (rate("weir_observed_total", PAIR, "reason"), "{{reason}}"),
        unit="reqps",
        stack=True,
    ),
    Panel(
        "Cool-down",
        "How long no request for a model goes to the gateway yet: it has asked for that, or fails.",
        (f"max by (model) (weir_cooldown_seconds{{{MODEL}}})", "{{model}}"),
        unit="s",
    ),
    Panel(
        "Learned quotas",
        "What weir has learned of the gateway's quotas, a minute: told by its headers, or inferred from its refusals. Absent "
        "while nothing is known, which is as it should be where nothing is refused.",
        (f"60 * sum by (model, source) (weir_learned_requests_per_second{{{MODEL}}})", "{{model}}: requests, {{source}}"),
        (f"60 * sum by (model) (weir_learned_tokens_per_second{{{MODEL}}})", "{{model}}: tokens"),
        unit=PER_MINUTE,
        others=[TOKENS_AT_THE_RIGHT],
        nothing="nothing was refused or told",
    ),
    Panel(
        "Breaker",
        "Open while the gateway fails: it is tried once a second, and the others wait, until they are refused.",
        (f"max by (model) (weir_breaker_open{{{MODEL}}})", "{{model}}"),
        most=1,
        words={0: "closed", 1: "open"},
    ),
]

CLIENTS = [
    Panel(
        "Requests by client",
        "The client is its name under [clients], or -.",
        (rate("weir_requests_total", PAIR, "client"), "{{client}}"),
        unit="reqps",
        stack=True,
    ),
    Panel(
        "Tokens by client",
        "Prompt and completion. Who waits takes turns by what each client has had of these.",
        (rate("weir_tokens_total", PAIR + ', kind=~"prompt|completion"', "client"), "{{client}}"),
        unit=TOKENS_PER_SECOND,
        stack=True,
    ),
    Panel(
        "Refused by client and reason",
        "Raise the limit, or have the client send less. x-weir-refused-by on its answers says whose limit it was.",
        (rate("weir_refused_total", PAIR, "client, reason"), "{{client}}: {{reason}}"),
        unit="reqps",
        stack=True,
    ),
]

ITSELF = [
    Panel(
        "Overhead",
        "What weir itself adds before an answer begins, without waiting and without the gateway.",
        (quantile(0.5, "weir_overhead_seconds", WEIR, "instance"), "{{instance}}, p50"),
        (quantile(0.99, "weir_overhead_seconds", WEIR, "instance"), "{{instance}}, p99"),
        unit="s",
    ),
    Panel(
        "Clients' connections",
        "Beyond server.max_connections they wait in the kernel, unseen: Bounds in use says how near that is.",
        (f"weir_client_connections{{{WEIR}}}", "{{instance}}"),
    ),
    Panel(
        "Connections to the gateway",
        "One for each request under way, and idle ones that are kept for the next.",
        (f"sum by (state) (weir_upstream_connections{{{WEIR}}})", "{{state}}"),
        stack=True,
    ),
    Panel(
        "Bodies in memory",
        "Of requests that wait or are under way without an answer. Beyond queue.max_bytes newcomers are refused: Bounds in use "
        "says how near that is.",
        (f"weir_buffered_bytes{{{WEIR}}}", "{{instance}}"),
        unit="bytes",
    ),
    Panel(
        "Bounds in use",
        "Of queue.max_waiting, queue.max_bytes, server.max_connections, and the file descriptors. At the top, newcomers are refused "
        "or have to wait: docs/operations.md, Sizing.",
        (f"sum by (instance) (weir_waiting{{{WEIR}}}) / on (instance) weir_waiting_limit{{{WEIR}}}", "{{instance}}: queue"),
        (f"weir_buffered_bytes{{{WEIR}}} / weir_buffered_bytes_limit{{{WEIR}}}", "{{instance}}: bodies"),
        (f"weir_client_connections{{{WEIR}}} / weir_client_connections_limit{{{WEIR}}}", "{{instance}}: connections"),
        (f"process_open_fds{{{WEIR}}} / process_max_fds{{{WEIR}}}", "{{instance}}: file descriptors"),
        unit="percentunit",
        steps=FULL,
        most=1,
    ),
    Panel(
        "Reserved tokens",
        "What requests under way are estimated to take, and is not settled yet.",
        (f"weir_reserved_tokens{{{WEIR}}}", "{{instance}}"),
        unit=TOKENS,
    ),
    Panel(
        "Memory",
        "Resident. It follows open streams and waiting bodies, and falls with them.",
        (f"process_resident_memory_bytes{{{WEIR}}}", "{{instance}}"),
        unit="bytes",
    ),
    Panel(
        "CPU",
        "Cores in use, over five minutes: the time is told in whole seconds.",
        (f"rate(process_cpu_seconds_total{{{WEIR}}}[5m])", "{{instance}}"),
    ),
    Panel(
        "Tasks and file descriptors",
        "They follow the connections, and fall with them.",
        (f"weir_tasks{{{WEIR}}}", "{{instance}}: tasks"),
        (f"process_open_fds{{{WEIR}}}", "{{instance}}: file descriptors"),
    ),
    Panel(
        "Guards",
        "How often a bound of [server] has held a client up, refused it or cut it off.",
        (rate("weir_guards_total", WEIR, "guard"), "{{guard}}"),
        unit=COUNTS_PER_SECOND,
        stack=True,
    ),
    Panel(
        "Reloads",
        "New configurations in the last hour, by what became of them. A refused one has changed nothing.",
        (f"sum by (result) (increase(weir_reloads_total{{{WEIR}}}[1h]))", "{{result}}"),
        colors={"applied": "green", "refused": "red"},
    ),
    Panel(
        "Configuration",
        "How long the configuration in force has been, and whether it is the last one given, or that was refused: then weir's log "
        "says why.",
        (f"time() - weir_config_last_reload_success_timestamp_seconds{{{WEIR}}}", "{{instance}}: age"),
        (f"weir_config_last_reload_successful{{{WEIR}}}", "{{instance}}: the last one"),
        unit="s",
        kind="stat",
        others=[LAST_ONE],
    ),
    Panel(
        "Stopping",
        "From the signal to stop on. It serves on for server.lame_duck, then what has begun may end for server.drain.",
        (f"weir_draining{{{WEIR}}}", "{{instance}}"),
        most=1,
        words={0: "serves", 1: "stops"},
    ),
    Panel(
        "Lost",
        "Lines of the access log that were not written, and TLS handshakes that came to nothing, a second.",
        (rate("weir_access_log_dropped_total", WEIR), "log lines"),
        (rate("weir_tls_handshake_failures_total", WEIR), "handshakes"),
        unit=COUNTS_PER_SECOND,
    ),
    Panel(
        "Versions and uptime",
        "How long each weir has run.",
        (
            f"(time() - process_start_time_seconds{{{WEIR}}})"
            f" * on (job, instance) group_left (version) weir_build_info{{{WEIR}}}",
            "{{instance}}, {{version}}",
        ),
        unit="s",
        kind="stat",
    ),
]

ROWS = [
    ("Overview", OVERVIEW),
    ("Limits", LIMITS),
    ("Models", MODELS),
    ("Clients", CLIENTS),
    ("weir itself", ITSELF),
]


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Some or all of a label's values."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": PROMETHEUS,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Also what appears only after the page was loaded.
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


VARIABLES = [
    {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "refresh": 1,
    },
    variable("job", "Job", "label_values(weir_build_info, job)"),
    variable("instance", "weir", 'label_values(weir_build_info{job=~"$job"}, instance)'),
    variable("model", "Model", f"label_values(weir_requests_total{{{WEIR}}}, model)"),
    variable("client", "Client", f"label_values(weir_requests_total{{{WEIR}}}, client)"),
]


def panels() -> list[dict[str, Any]]:
    """All rows, one below the other, each filled from left to right."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        placed.append({
            "id": len(placed) + 1,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        })
        y += 1
        x = height = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            placed.append(panel.json(len(placed) + 1, x, y))
            x, height = x + panel.width, panel.height()
        y += height
    return placed


def dashboard() -> dict[str, Any]:
    return {
        "uid": "weir",
        "title": "weir",
        "description": "Who waits for what, and whose limit is it? docs/operations.md says what to do.",
        "tags": ["weir"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "timezone": "browser",
        "annotations": {
            "list": [
                {
                    "name": "Starts",
                    "datasource": PROMETHEUS,
                    "enable": True,
                    "iconColor": "blue",
                    "expr": f"changes(process_start_time_seconds{{{WEIR}}}[1m]) > 0",
                    "titleFormat": "{{instance}} has started",
                }
            ]
        },
        "templating": {"list": VARIABLES},
        "panels": panels(),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
