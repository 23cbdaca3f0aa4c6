"""Clients that reach weir over TLS or a unix socket, as they come from their makers."""

import json
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest
from openai import APIConnectionError, DefaultHttpxClient, OpenAI

from harness import QUICK, tool
from test_curl import POST, POST_STREAM, curl

CALL = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "안녕하세요"}]}


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that signed itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", cert, "-keyout", key,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture
def weir_with_tls(start_simulator, start_weir, identity: tuple[Path, Path]):
    """A weir whose clients speak TLS, and the URL that they know it by."""
    cert, key = identity
    weir = start_weir(start_simulator(*QUICK), f'[server]\ntls = {{ cert = "{cert}", key = "{key}" }}')
    return weir, weir.base_url.replace("http://127.0.0.1", "https://localhost")


@pytest.mark.parametrize(("version", "told"), [("--http1.1", "1.1"), ("--http2", "2")])
def test_curl_speaks_tls_in_both_versions(weir_with_tls, identity: tuple[Path, Path], version: str, told: str):
    _, url = weir_with_tls
    cacert = ["--cacert", str(identity[0]), version]
    answer = curl(*cacert, *POST, "--write-out", "\n%{http_version}", f"{url}/chat/completions")
    body, _, spoken = answer.rpartition("\n")
    assert (spoken, json.loads(body)["object"]) == (told, "chat.completion")
    stream = curl(*cacert, *POST_STREAM, f"{url}/chat/completions")
    assert stream.endswith("data: [DONE]\n\n")


def test_the_openai_client_speaks_tls_with_an_authority_of_its_own(weir_with_tls, identity: tuple[Path, Path]):
    weir, url = weir_with_tls
    trusting = ssl.create_default_context(cafile=str(identity[0]))
    with OpenAI(base_url=url, api_key="any", max_retries=0, http_client=DefaultHttpxClient(verify=trusting)) as client:
        assert client.chat.completions.create(**CALL).choices[0].message.content
        pieces = list(client.chat.completions.create(**CALL, stream=True))
        assert any(piece.choices[0].delta.content for piece in pieces if piece.choices)
    with OpenAI(base_url=url, api_key="any", max_retries=0) as distrusting, pytest.raises(APIConnectionError):
        distrusting.chat.completions.create(**CALL)
    assert weir.metric("weir_tls_handshake_failures_total") == 1


def test_clients_reach_weir_through_a_unix_socket(start_simulator, start_weir, tmp_path: Path):
    path = tmp_path / "weir.sock"
    start_weir(start_simulator(*QUICK), f'[server]\nlisten = ["127.0.0.1:0", "unix:{path}"]')
    stream = curl("--unix-socket", str(path), *POST_STREAM, "http://localhost/v1/chat/completions")
    assert stream.endswith("data: [DONE]\n\n")
    # What the SDK itself is built on, and has no name of its own for.
    http_client = DefaultHttpxClient(transport=httpx2.HTTPTransport(uds=str(path)))
    with OpenAI(base_url="http://localhost/v1", api_key="any", max_retries=0, http_client=http_client) as client:
        assert client.chat.completions.create(**CALL).choices[0].message.content
