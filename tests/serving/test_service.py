"""The service under load and faults: slots, the queue, deadlines, clients that disconnect.

python -m pytest tests/serving/test_service.py
"""

import errno
import http.client
import json
import re
import signal
import socket
import time
import weakref

import pytest
import requests
import serving_helpers as serving
import torch
from serving_helpers import LONG, WAIT, Server, events, in_background, make_model, run_server

from gptlib.inference.cpu_layers import can_pack
from gptlib.serving.api import VERSION
from gptlib.serving.service import Service
from inference import LoadedModel, generate_text
from train_gpt2 import GPT

model, home, server = serving.model, serving.home, serving.server


def test_greedy_text_is_the_models_own_in_a_crowd(server, model):
    """Guards against sequences that change the text of their neighbours."""
    expected = {
        n: generate_text(model, "a b" * n, max_length=20 + 20 * n, temperature=0, top_k=None)
        for n in range(1, 9)
    }
    found = {
        n: in_background(server.post, prompt="a b" * n, max_length=20 + 20 * n, temperature=0)
        for n in expected
    }
    for n, future in found.items():
        answer = future.result(WAIT).json()
        assert answer["generated_text"] == expected[n]
        assert (answer["tokens_generated"], answer["prompt_tokens"]) == (20 + 20 * n, 3 * n)


def test_health_says_that_the_weights_are_in_8_bits(home):
    """Guards against a server in 8 bits that nobody can tell from one in bfloat16."""
    with run_server(home, QUANTIZE="int8") as server:
        server.ready()
        assert server.get("/health").json()["quantize"] == "int8"
        server.wait_for(r"serving model_40000: .*, int8\n")  # the line follows the state
        assert server.post(prompt="abc", max_length=7).json()["tokens_generated"] == 7


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no packed kernels")
def test_packed_weights_are_held_once():
    """Guards against a server that keeps the layers it has packed, 3 GB of GPT-2 XL's."""
    model = GPT(serving.CONFIG).to(torch.bfloat16).requires_grad_(False)
    weights = [weakref.ref(block.mlp.c_fc.weight) for block in model.transformer.h]
    loaded = [LoadedModel(model, make_model().tokenizer, "none", step=1, sample_prompt="")]
    del model
    service = Service(loaded.pop, "m").start()
    try:
        Server.until(lambda: service.status != "loading")
        assert service.status == "healthy"
        assert [weight() for weight in weights] == [None] * len(weights)
    finally:
        service.close()


def test_health_and_metrics_report_the_state(server, model):
    """Guards against metrics that stand still, and names that break Prometheus's rules."""
    health = server.get("/health").json()
    expected = dict(
        status="healthy",
        model="model_40000",
        step=40000,
        device="cpu",
        dtype="float32",
        quantize="none",
        slots=4,
        context=64,
        parameters=sum(p.numel() for p in model.parameters()),
        key_required=False,
        version=VERSION,
    )
    assert {k: health[k] for k in expected} == expected
    before = (
        server.metric("gpt2_generated_tokens_total"),
        server.metric("gpt2_http_requests_total", route="/generate"),
    )
    server.post(prompt="abc", max_length=7)
    server.post(prompt="abc", max_length=-7)
    assert server.metric("gpt2_generated_tokens_total") == before[0] + 7
    assert server.metric("gpt2_http_requests_total", route="/generate") == before[1] + 2
    assert server.metric("gpt2_time_to_first_token_seconds_count") > 0
    assert server.metric("gpt2_http_request_duration_seconds_count", route="/generate") > 0
    reused = server.metric("gpt2_reused_prompt_tokens_total")
    for _ in range(2):
        server.post(prompt="a beginning of 40 letters, all its own: end", max_length=2)
    assert server.metric("gpt2_reused_prompt_tokens_total") == reused + 42
    assert server.metric("gpt2_slots") == 4
    assert server.metric("gpt2_queue_sequences") == 0
    for line in server.get("/metrics").text.splitlines():
        # Prometheus's rules: one prefix, counters end in _total, base units
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name.startswith(("gpt2_", "process_")), line
            assert kind != "counter" or name.endswith("_total"), line
            assert not re.search("milli|_ms|_mb|minutes", name)


def test_a_short_request_does_not_wait_for_a_long_one(server):
    """Guards against a queue in which one long request blocks all others."""
    long = server.post(stream=True, prompt="long", max_length=LONG)
    lines = long.iter_lines()
    next(lines)
    for _ in range(3):
        assert server.post(prompt="short", max_length=5).json()["tokens_generated"] == 5
    # it gives up its slot for a moment whenever its context is full
    server.until(lambda: server.metric("gpt2_slots_in_use") == 1)
    assert next(lines) is not None
    long.close()
    server.idle()


def test_more_requests_than_capacity_get_429(server):
    """Guards against requests that are lost or hang when the queue is full."""
    answers = [in_background(server.post, prompt="abc", max_length=400, seed=i) for i in range(40)]
    answers = [a.result(WAIT) for a in answers]
    refused = [a for a in answers if a.status_code == 429]
    served = [a for a in answers if a.status_code == 200]
    assert len(served) + len(refused) == 40
    assert len(served) >= 8
    assert refused
    assert all(
        int(a.headers["Retry-After"]) >= 1 and "queue is full" in a.json()["error"]["message"]
        for a in refused
    )
    assert all(a.json()["tokens_generated"] == 400 for a in served)
    assert len({a.json()["generated_text"] for a in served}) == len(served)
    assert server.metric("gpt2_slots_in_use") == server.metric("gpt2_queue_sequences") == 0
    assert server.post(prompt="abc", max_length=2).ok


def test_memory_stays_flat_over_thousands_of_requests(server):
    """Guards against jobs that are kept after they have ended."""

    def some(n):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        for i in range(n):
            path, body = (
                ("/generate", dict(prompt="abc" * (i % 7), max_length=2, stream=i % 5 == 0)),
                ("/v1/completions", dict(prompt="abc", max_tokens=2)),
            )[i % 2]
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200
            assert response.read()

    def wave(n):
        for future in [in_background(some, n // 8) for _ in range(8)]:
            future.result(10 * WAIT)
        return server.metric("process_resident_memory_bytes")

    before = wave(800)
    assert wave(2400) - before < 4e6


FAULTS = """
import torch, train_gpt2
from gptlib.inference import engine
from gptlib.inference.kv_cache import Prefill
hidden, step = train_gpt2.GPT.hidden, engine.Engine.step
def fragile(self, idx, attention):
    if 1 in idx and isinstance(attention, Prefill):
        raise RuntimeError("secret: no memory for this prompt")
    return hidden(self, idx, attention)
def slow(self):
    if any(2 in r.prompt for r in self.live): raise RuntimeError("secret: the device is gone")
    time.sleep(0.02)
    return step(self)
train_gpt2.GPT.hidden, engine.Engine.step = fragile, slow
"""


@pytest.fixture(scope="module")
def faulty(home):
    """A server that takes 20 ms a token.

    The byte 1 in a prompt breaks its own forward pass, the byte 2 the engine's whole step.
    """
    with run_server(home, FAULTS, MAX_BODY_SIZE="3000", REQUEST_TIMEOUT="6") as server:
        yield server.ready()


def test_a_failing_request_leaves_the_others_alone(faulty, model):
    """Guards against one bad request that ends its neighbours, or an answer that leaks details."""
    expected = generate_text(model, "good", max_length=50, temperature=0, top_k=None)
    before = faulty.metric("gpt2_prompt_tokens_total")
    others = [
        in_background(faulty.post, prompt="good", max_length=50, temperature=0) for _ in range(3)
    ]
    # three prompts of four tokens: all are accepted, and get their slots before what comes later
    faulty.until(lambda: faulty.metric("gpt2_prompt_tokens_total") == before + 12)
    for stream in (False, True):
        bad = faulty.post(prompt="bad \x01", stream=stream)
        assert bad.status_code == 500
        assert "secret" not in bad.text
        assert "Traceback" not in bad.text
    assert [o.result(WAIT).json()["generated_text"] for o in others] == [expected] * 3
    faulty.wait_for("secret: no memory for this prompt")
    assert faulty.metric("gpt2_sequences_total", finish_reason="error") >= 2


def test_the_engine_goes_on_after_a_failed_step(faulty):
    """Guards against an engine that is dead after one failed step."""
    other = faulty.post(prompt="good", max_length=100, stream=True)
    lines = other.iter_lines()
    next(lines)
    assert faulty.post(prompt="\x02").status_code == 500
    told = [json.loads(line[6:]) for line in lines if line]
    assert told[-1]["error"]["type"] == "server_error"
    assert "secret" not in str(told)
    assert faulty.post(prompt="good", max_length=5).json()["tokens_generated"] == 5
    assert faulty.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slot(faulty, stream):
    """Guards against generating on for clients that have hung up."""
    faulty.idle()
    before = faulty.metric("gpt2_generated_tokens_total")
    cancelled = faulty.metric("gpt2_sequences_total", finish_reason="cancelled")
    body = json.dumps(dict(prompt="abc", max_length=LONG, stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", faulty.port), WAIT) as s:
        s.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        received = b""
        while stream and received.count(b"data: ") < 10:
            received += s.recv(10000)
        faulty.until(lambda: stream or faulty.metric("gpt2_slots_in_use") == 1)
    faulty.until(
        lambda: faulty.metric("gpt2_sequences_total", finish_reason="cancelled") == cancelled + 1
    )
    faulty.idle()
    tokens = faulty.metric("gpt2_generated_tokens_total") - before
    assert (
        tokens <= received.count(b"data: ") + 100
    )  # of 50,000; two seconds' worth, for a machine that is busy


def test_an_unfinished_request_gets_504_at_its_deadline(faulty):
    """Guards against requests that run past REQUEST_TIMEOUT."""
    started = time.monotonic()
    waiting = in_background(faulty.post, prompt="abc", max_length=LONG)
    streamed = faulty.post(prompt="abc", max_length=LONG, stream=True)
    told = [json.loads(line[6:]) for line in streamed.iter_lines() if line]
    assert "6 seconds" in told[-1]["error"]["message"]
    assert len(told) > 20
    assert waiting.result(WAIT).status_code == 504
    assert "REQUEST_TIMEOUT" in waiting.result().json()["error"]["message"]
    assert time.monotonic() - started >= 6
    faulty.idle()


# A signal goes to another thread, and does not end what the main thread waits for: as on Windows.
DEAF_WHILE_WAITING = """
import signal, threading
wait = threading.Event.wait
def deaf_wait(event, timeout=None):
    if threading.current_thread() is not threading.main_thread():
        return wait(event, timeout)
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return wait(event, timeout)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
threading.Event.wait = deaf_wait
"""


def test_ctrl_c_ends_a_server_whose_waits_it_cannot_end(home):
    """Guards against Ctrl-C that does nothing on Windows, where a handler runs when a wait ends."""
    with run_server(home, DEAF_WHILE_WAITING) as server:
        server.ready()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(WAIT) == 0


def test_sigterm_finishes_the_requests_in_flight(home, tmp_path):
    """Guards against requests lost at shutdown, and requests taken before the model is loaded."""
    may_load = tmp_path / "may_load"
    code = FAULTS + f"""
from pathlib import Path
load = serve.load_for_sampling
def load_when_told(*args, **settings):
    while not Path({str(may_load)!r}).exists(): time.sleep(0.02)
    return load(*args, **settings)
serve.load_for_sampling = load_when_told
"""
    with run_server(home, code, SLOTS="1") as server:
        health = server.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        assert server.post(prompt="early").status_code == 503
        assert "Retry-After" in server.post(prompt="early").headers
        assert server.get("/").status_code == 200
        may_load.touch()
        server.ready()
        running = in_background(server.post, prompt="abc", max_length=50)
        # returns once it has the only slot, for three seconds
        streamed = server.post(stream=True, prompt="abc", max_length=150)
        waiting = in_background(server.post, prompt="abc", max_length=3)
        # three prompts of three tokens: all are accepted, in whatever order they came
        server.until(lambda: server.metric("gpt2_prompt_tokens_total") == 9)
        connected = requests.Session()  # its connection stays open
        assert connected.get(f"{server.url}/health", timeout=WAIT).ok
        exited = in_background(server.stop)
        server.wait_for("finishing the requests in flight")

        def is_refused():
            with socket.socket() as s:
                return s.connect_ex(("127.0.0.1", server.port)) == errno.ECONNREFUSED

        server.until(is_refused)  # a proxy then asks another server
        late = connected.post(f"{server.url}/generate", json=dict(prompt="late"), timeout=WAIT)
        assert late.status_code == 503
        assert "draining" in late.json()["error"]["message"]
        assert "Retry-After" in late.headers
        assert events(streamed)[-1]["tokens_generated"] == 150
        assert running.result(WAIT).json()["tokens_generated"] == 50
        assert waiting.result(WAIT).json()["tokens_generated"] == 3
        assert exited.result(WAIT) == 0

