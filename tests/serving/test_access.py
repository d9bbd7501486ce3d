"""Who may ask: host names, keys, other pages of the web, addresses behind a proxy.

    python -m pytest tests/serving/test_access.py
"""

import pytest
import requests
import serving_helpers as serving
from serving_helpers import WAIT, run_server

from gptlib.serving.access import client_address, is_loopback

model, home, server = serving.model, serving.home, serving.server


@pytest.mark.parametrize("host", ["evil.example", "evil.example:5000", "127.0.0.1.evil.example",
                                  "localhost.evil.example", "10.0.0.1"])
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_a_private_server_answers_to_no_other_name(server, host, path):
    """Guards against a web page that reads the model of its reader's machine (DNS rebinding)."""
    response = requests.get(server.url + path, headers={"Host": host}, timeout=WAIT)
    assert response.status_code == 403
    assert "ALLOWED_HOSTS" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:5000", "127.0.0.1:1", "[::1]:5000",
                                  "gpt2.localhost"])
def test_a_private_server_answers_to_its_own_names(server, host):
    """Guards against a check that locks out who is meant to ask."""
    assert requests.get(f"{server.url}/health", headers={"Host": host}, timeout=WAIT).ok


@pytest.mark.parametrize("name, expected", [
    ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("0.0.0.0", False), ("192.168.1.1", False), ("", False), ("localhost.example", False)])
def test_loopback_names_are_known(name, expected):
    """Guards against an address of the network taken for this machine's own."""
    assert is_loopback(name) is expected


class Asked:
    """What client_address asks of a request."""

    def __init__(self, *forwarded):
        self.forwarded = forwarded
        self.remote_addr = "10.0.0.9"
        self.headers = self

    def getlist(self, name):
        assert name == "X-Forwarded-For"
        return list(self.forwarded)


@pytest.mark.parametrize("hops, forwarded, expected", [
    (0, ["1.1.1.1"], "10.0.0.9"),  # no proxy is trusted: the header is the client's invention
    (1, ["1.1.1.1"], "1.1.1.1"),
    (1, ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),  # the client sent 6.6.6.6, the proxy appended the truth
    (1, ["6.6.6.6", "1.1.1.1"], "1.1.1.1"),
    (2, ["6.6.6.6, 1.1.1.1, 2.2.2.2"], "1.1.1.1"),
    (2, ["1.1.1.1"], "10.0.0.9"),  # it came past the proxies
    (1, [], "10.0.0.9"),
])
def test_the_clients_address_is_what_the_trusted_proxies_say(hops, forwarded, expected):
    """Guards against forged headers that give a client the rate of another one, or of many."""
    assert client_address(Asked(*forwarded), hops) == expected


@pytest.fixture(scope="module")
def behind_proxy(home):
    settings = dict(RATE_LIMIT="4 per minute", TRUSTED_PROXIES="1", QUEUE_SIZE="20",
                    ALLOWED_HOSTS="gpt2.example",
                    CORS_ORIGINS="https://a.example,https://b.example")
    with run_server(home, **settings) as server:
        yield server.ready()


def test_each_client_behind_a_proxy_has_its_own_rate(behind_proxy):
    """Guards against a proxy that counts as one client, and headers that a client forges."""
    def ask(forwarded, **body):
        headers = {"X-Forwarded-For": forwarded}
        return behind_proxy.post(prompt="a", max_length=1, headers=headers, **body)

    assert [ask(f"6.6.6.{i}, 1.1.1.1").status_code for i in range(5)] == [200] * 4 + [429]
    assert ask("1.1.1.2").ok
    too_many = ask("1.1.1.3", num_samples=5)
    assert too_many.status_code == 400
    assert "makes 5 sequences: expected at most 4" in too_many.json()["error"]["message"]
    assert ask("1.1.1.4", num_samples=3).ok
    refused = ask("1.1.1.4", num_samples=3)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 60


def test_an_allowed_host_is_answered(behind_proxy):
    """Guards against a server behind a proxy that refuses the name which the proxy sends."""
    for host, status in (("gpt2.example", 200), ("GPT2.example:80", 200), ("other.example", 403)):
        response = requests.get(f"{behind_proxy.url}/health", headers={"Host": host}, timeout=WAIT)
        assert response.status_code == status, host


def preflight(server, origin):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "content-type,x-api-key"}
    return requests.options(f"{server.url}/generate", headers=headers, timeout=WAIT)


def test_pages_of_allowed_origins_may_ask(behind_proxy, server):
    """Guards against a setting that lets every page in, or none."""
    answer = preflight(behind_proxy, "https://b.example")
    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == "https://b.example"
    assert "X-API-Key" in answer.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Origin" not in preflight(
        behind_proxy, "https://evil.example").headers
    assert "Access-Control-Allow-Origin" not in preflight(server, "https://b.example").headers
    models = requests.get(f"{behind_proxy.url}/v1/models", timeout=WAIT,
                          headers={"Origin": "https://a.example"})
    assert models.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "Origin" in models.headers["Vary"]


def test_a_key_hides_the_prompt_and_allows_preflights(home):
    """Guards against a prompt of the training text for everybody, and a browser that needs the key
    before it may send it.
    """
    settings = dict(API_KEY="secret", CORS_ORIGINS="*")
    with run_server(home, **settings) as server:
        server.ready()
        stranger = requests.get(f"{server.url}/health", headers={"Host": "any.example"},
                                timeout=WAIT)
        assert stranger.ok, "a key protects the model, whatever the name"
        assert "sample_prompt" not in stranger.json()
        assert server.get("/health").json()["sample_prompt"]
        for scheme in ("Bearer", "bearer", "BEARER"):
            headers = {"Authorization": f"{scheme} secret"}
            assert requests.get(f"{server.url}/v1/models", headers=headers, timeout=WAIT).ok
        headers = {"Authorization": "secret"}
        refused = requests.get(f"{server.url}/v1/models", headers=headers, timeout=WAIT)
        assert refused.status_code == 401
        assert preflight(server, "https://any.example").status_code == 204


def test_an_open_server_without_a_key_is_warned_of(home):
    """Guards against a server that the whole network may use, without a word."""
    with run_server(home, HOST="0.0.0.0") as server:
        server.wait_for("warning: HOST is 0.0.0.0 and there is no API_KEY")
