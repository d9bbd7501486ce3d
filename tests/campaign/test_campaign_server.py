"""The campaign: hostile requests, clients that hang up at any byte, and a server under load for
long.

    python -m pytest tests/campaign/test_campaign_server.py -m campaign

Hostile requests are drawn from the OpenAPI description by schemathesis (requirements-dev.txt).
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import threading
import time

import campaign
import pytest
import requests
import serving_helpers as serving
from campaign import scaled
from serving_helpers import run_server

pytestmark = campaign.marks
rng, progress = campaign.rng, campaign.progress
model, home = serving.model, serving.home

ROUTES = ["/generate", "/v1/completions"]

# What the description cannot say: 1.0 is no whole number here; prompts have to be of the
# vocabulary, and not empty; how many sequences they make counts too; some fields exclude others.
BEYOND_SCHEMA = ["expected a whole number", "prompt", "sequences", "best_of", "max_tokens is 0",
                 "logprobs come"]


def memory(server):
    """Resident memory of the server in MiB."""
    with open(f"/proc/{server.process.pid}/status") as f:
        line = next(line for line in f if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def open_files(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def assert_well(server):
    """It runs, is idle, still answers, and has printed no traceback."""
    server.idle()
    assert server.post(prompt="x", max_length=3).status_code == 200
    assert server.metric("gpt2_queue_sequences") == 0
    assert "Traceback" not in server.log(), server.log()[-3000:]


# -----------------------------------------------------------------------------
# hostile requests


def draw_cases(description, route, mode, count, seen):
    """Give `count` requests that schemathesis draws from the description to seen(case)."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    operation = schemathesis.openapi.from_dict(description)[route]["POST"]
    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @seed(campaign.SEED)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(case):
        seen(case)

    draw()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", ["negative", "positive"])
def test_requests_drawn_from_the_description(home, progress, route, mode):
    """Guards against a 500, a hang or an answer that is no JSON for whatever a body may hold; and
    against a body that the description allows and the server refuses."""
    pytest.importorskip("schemathesis", reason="in requirements-dev.txt")
    count, statuses, unexpected = scaled(2500), {}, []
    with run_server(home, MAX_LENGTH_LIMIT="40") as server, requests.Session() as session:
        server.ready()
        bar = progress(None, f"{mode} bodies for {route}")
        allowed = {200, 400, 415, 413} if mode == "negative" else {200, 400, 404, 429}

        def send(case):
            arguments = case.as_transport_kwargs(base_url=server.url)
            answer = session.request(**arguments, timeout=serving.WAIT)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code not in allowed:
                unexpected.append((answer.status_code, case.body))
            if answer.status_code != 200:
                message = answer.json()["error"]["message"]
                assert message, case.body
                if answer.status_code == 400 and mode == "positive":
                    assert any(text in message for text in BEYOND_SCHEMA), (message, case.body)
            elif not answer.headers["Content-Type"].startswith("text/event-stream"):
                answer.json()
            bar.update()

        description = requests.get(f"{server.url}/openapi.json", timeout=serving.WAIT).json()
        draw_cases(description, route, mode, count, send)
        assert unexpected == []
        assert_well(server)
    counts = ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items()))
    progress.tell(f"{sum(statuses.values())} {mode} bodies for {route} ({counts})")


# -----------------------------------------------------------------------------
# hang-ups


def raw_request(rng):
    """The bytes of a valid request."""
    body = dict(prompt="the cat", max_length=rng.choice([1, 20, 2000]), stream=rng.random() < 0.5)
    route = rng.choice(ROUTES)
    if route == "/v1/completions":
        body["max_tokens"] = body.pop("max_length")
    data = json.dumps(body).encode()
    if rng.random() < 0.2:
        path = rng.choice(["/", "/health", "/metrics"])
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    head = (f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n")
    return head.encode() + data


def hang_up(port, rng):
    """Send a request up to a random byte, or all of it and read up to a random byte, and leave:
    by closing, by a reset, or after half a close."""
    request = raw_request(rng)
    with socket.create_connection(("127.0.0.1", port), timeout=serving.WAIT) as connection:
        if rng.random() < 0.5:
            connection.sendall(request[:rng.randrange(len(request) + 1)])
        else:
            connection.sendall(request)
            if rng.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(rng.uniform(0, 0.1))
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection.recv(rng.randint(1, 400))
        if rng.random() < 0.5:  # reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_hang_up_at_any_byte(home, rng, progress):
    """Guards against slots, threads or connections that a client takes with it."""
    count = scaled(2000)
    with run_server(home) as server:
        server.ready()
        hang_up(server.port, rng)
        server.idle()
        before = open_files(server)
        for _ in progress(range(count), "hang-ups"):
            hang_up(server.port, rng)
        assert_well(server)
        server.until(lambda: open_files(server) <= before + 3)
        progress.tell(f"{count} hang-ups at random bytes: no slot, connection or thread lost, "
                      f"{server.metric('gpt2_slots_in_use'):.0f} slots in use")


# -----------------------------------------------------------------------------
# small requests for long


def small_request(connection, rng):
    """One request of a client that keeps its connection; returns the status."""
    kind = rng.random()
    if kind < 0.5:
        body = json.dumps(dict(prompt="x" * rng.randint(0, 30), max_length=1))
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    elif kind < 0.8:
        connection.request("GET", "/health")
    elif kind < 0.9:
        connection.request("GET", "/nothing/" + "x" * rng.randint(0, 100))
    else:
        body = rng.randbytes(rng.randint(0, 50))
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the memory in /proc")
def test_memory_stays_flat(home, rng, progress):
    """Guards against memory that grows with every request: a server is to run for months."""
    count, clients, statuses, sizes = scaled(100000), 4, {}, []
    with run_server(home) as server:
        server.ready()
        bar = progress(range(count), "small requests")

        def work(n):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=serving.WAIT)
            for _ in range(n):
                status = small_request(connection, rng)
                statuses[status] = statuses.get(status, 0) + 1
                bar.update()

        for _ in range(10):
            threads = [threading.Thread(target=work, args=(count // clients // 10,))
                       for _ in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sizes.append(memory(server))
        assert set(statuses) <= {200, 400, 404, 429}
        assert_well(server)
    grown = sizes[-1] - sizes[1]
    shown = ", ".join(f"{size:.1f}" for size in sizes)
    progress.tell(f"{sum(statuses.values())} small requests; MiB after each tenth: {shown}")
    assert grown < 5, f"memory has grown by {grown:.1f} MiB: {shown}"


# -----------------------------------------------------------------------------
# stopped and continued; the clock set back


def test_the_server_is_stopped_and_continued(home, rng, progress):
    """Guards against requests that are lost when the machine sleeps."""
    with run_server(home) as server:
        server.ready()
        expected = server.post(prompt="the", max_length=200, temperature=0).json()
        for _ in progress(range(scaled(50)), "server, SIGSTOP"):
            future = serving.in_background(server.post, prompt="the", max_length=200, temperature=0)
            time.sleep(rng.uniform(0, 0.2))
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.5))
            server.process.send_signal(signal.SIGCONT)
            answer = future.result(serving.WAIT).json()
            assert answer["generated_text"] == expected["generated_text"]
        assert_well(server)
    progress.tell(f"server: {scaled(50)} SIGSTOP and SIGCONT, every answer as undisturbed")


def test_the_clock_goes_back_under_the_server(home, tmp_path, rng, progress):
    """Guards against deadlines and rate limits that follow the wall clock: set back by a day, it
    would lock every client out for one."""
    offset, count, waits = tmp_path / "offset", scaled(30), []
    offset.write_text("0")
    code = (f"real = time.time\n"
            f"time.time = lambda: real() + float(open({str(offset)!r}).read() or 0)")
    with run_server(home, code, RATE_LIMIT="5/second") as server:
        server.ready()
        for i in progress(range(count), "server, clock back"):
            statuses = [server.post(prompt="the", max_length=3).status_code for _ in range(5)]
            assert 200 in statuses
            offset.write_text(str(-i * 1000 - rng.uniform(10, 86400)))
            begin = time.monotonic()
            server.until(lambda: server.post(prompt="the", max_length=3).status_code == 200)
            waits.append(time.monotonic() - begin)
            offset.write_text("0")
            time.sleep(1.1)
        assert_well(server)
    progress.tell(f"server with a rate limit, clock set back {count} times by up to a day: clients "
                  f"wait at most {max(waits):.1f} s")
