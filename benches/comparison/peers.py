"""What is compared. A peer is a function from its place to a command line; it writes its configuration first.

Each of them limits requests at rates that are not reached, and keeps its connections to the upstream.
"""

import os
from dataclasses import dataclass
from string import Template

# Enough for the clients' 5,000.
CONNECTIONS = 8192

RATE = 'requests = { rate = "60000000/min", burst = 1000000 }'
TOKENS = 'tokens = { rate = "100000000/s", burst = 1000000000 }'
NONE_REACHED = f"{RATE}\n{TOKENS}\nconcurrency = 100000"

WEIR_CONFIG = f"""
[server]
listen = "$listen"
admin_listen = "$admin"
max_connections = $connections
[upstream]
base_url = "http://$upstream/v1"
[limits]
{NONE_REACHED}
[queue]
max_waiting = 200000
max_wait = "10min"
[retry]
max_retries = 3
[log]
access = "$access"
level = "warn"
[models."*"]
{NONE_REACHED}
[models.slow]
concurrency = 1
[clients.bench]
key = "sk-not-a-key"
{NONE_REACHED}
"""

NGINX_CONFIG = """
$user
worker_processes $cores;
worker_rlimit_nofile $files;
master_process $master;
daemon off;
pid nginx.pid;
error_log stderr crit;
events { worker_connections $connections; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 100000000;
    client_max_body_size 32m;
    $body_buffer
    limit_req_zone $$server_name zone=all:1m rate=1000000r/s;
    upstream gateway {
        server $upstream;
        keepalive 1024;
        keepalive_requests 100000000;
    }
    server {
        listen $listen backlog=1024;
        location / {
            limit_req zone=all burst=1000000 nodelay;
            proxy_pass http://gateway;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 10m;
        }
    }
}
"""

# Without http-no-delay it would hold small events back.
HAPROXY_CONFIG = """
global
    nbthread $cores
    maxconn $connections
defaults
    mode http
    maxconn $connections
    option http-no-delay
    http-reuse always
    timeout connect 5s
    timeout client 10m
    timeout server 10m
frontend clients
    bind $listen backlog 1024
    stick-table type ip size 100k expire 1m store http_req_rate(1s)
    http-request track-sc0 src
    http-request deny deny_status 429 if { sc_http_req_rate(0) gt 1000000 }
    default_backend gateway
backend gateway
    server gateway $upstream
"""


@dataclass(frozen=True)
class Scene:
    """What a peer is set up for. Only weir has models and clients to configure."""

    models: int = 0
    clients: int = 0
    # The clients'. nginx and HAProxy reserve memory for as many as they are told to expect.
    connections: int = CONNECTIONS
    threads: int = os.cpu_count()


def pass_through(load, *options):
    def command(place):
        threads = ["--threads", place.scene.threads]
        return [load, "pass-through", "--listen", place.listen, "--upstream", place.upstream, *threads, *options]

    return command


def weir(binary, access="off"):
    """Its access log is off, as the others' are, unless a file is given, or the word for stderr."""

    def command(place):
        scene = place.scene
        text = WEIR_CONFIG + tables("models", "model", scene.models) + tables("clients", "client", scene.clients)
        options = {"admin": place.admin, "connections": scene.connections, "access": access}
        config = write(place, "weir.toml", text, **options)
        return [binary, "serve", "--config", config]

    return command


def tables(kind, name, count):
    """As many models or clients as the load varies over, each with limits of its own. Client 0 is there in any case."""
    key = (lambda number: f'key = "sk-client-{number}"\n') if kind == "clients" else (lambda _: "")
    first = 1 if kind == "clients" else 0
    return "".join(f"[{kind}.{name}-{number}]\n{key(number)}{NONE_REACHED}\n" for number in range(first, count))


def nginx(binary, files, body_buffer="client_body_buffer_size 2m;"):
    """Bodies are kept in memory, where its default of 16 KiB writes longer ones to disk first."""

    def command(place):
        # A single process, where there is to be one thread, is what the tracing tools can follow.
        master = "on" if place.scene.threads > 1 else "off"
        # Root's workers would be somebody else, who cannot write to our directory.
        user = "user root;" if os.geteuid() == 0 else ""
        options = {"cores": place.scene.threads, "master": master, "user": user, "body_buffer": body_buffer}
        # It counts those to the upstream too.
        connections = 2 * place.scene.connections
        config = write(place, "nginx.conf", NGINX_CONFIG, files=files, connections=connections, **options)
        return [binary, "-e", "stderr", "-p", place.directory, "-c", config]

    return command


def haproxy(binary, files):
    def command(place):
        connections = min(place.scene.connections, files // 2 - 100)
        options = {"cores": place.scene.threads, "connections": connections}
        return [binary, "-db", "-f", write(place, "haproxy.cfg", HAPROXY_CONFIG, **options)]

    return command


def write(place, name, text, **values):
    path = place.directory / name
    path.write_text(Template(text).substitute(listen=place.listen, upstream=place.upstream, **values))
    return path
