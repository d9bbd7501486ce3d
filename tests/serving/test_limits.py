"""Clients that cost more than their share: of threads, connections, output, memory and time.

    python -m pytest tests/serving/test_limits.py
"""

import contextlib
import json
import socket
import time

import pytest
import requests
import serving_helpers as serving
from serving_helpers import LONG, WAIT, in_background, run_server

model, home, server = serving.model, serving.home, serving.server

# prompts whose echo is 8 MB, for the byte 0 is six characters in JSON: no kernel buffers so much
LARGE = dict(prompt=[[0] * 170000] * 8, max_tokens=1, echo=True, stream=True)
LARGE_LIMITS = dict(MAX_PROMPT_LENGTH="200000", MAX_BODY_SIZE=str(10**7))


@pytest.fixture(scope="module")
def impatient(home):
    """A server that gives clients up after a few seconds without progress."""
    code = """
from gptlib.serving import http_server
http_server.REQUEST_SECONDS = http_server.STALL_SECONDS = 5
"""
    with run_server(home, code, **LARGE_LIMITS) as server:
        yield server.ready()


def send_post(s, path, **body):
    """Send a request over a socket of its own, without reading the answer."""
    data = json.dumps(body).encode()
    s.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
              b"Content-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data)


@pytest.fixture
def stalled():
    """A socket whose kernel buffers little, so that a client which reads nothing is noticed."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(WAIT)
        yield s


def is_closed(s):
    """Whether the server has closed or reset a connection whose client reads nothing."""
    s.settimeout(0.1)
    try:
        s.send(b" ")
    except OSError:
        return True
    return False


# -----------------------------------------------------------------------------
# prompts and bodies


@pytest.mark.parametrize("prompt", [[" " * 1040000], ["a", " " * 1040000], [[1] * 40000]])
def test_a_long_prompt_is_refused_before_encoding(server, prompt):
    """Guards against a text that overflows the stack of the tokenizer: its panic passed every
    handler, and the connection was lost.
    """
    response = server.post("/v1/completions", prompt=prompt)
    assert response.status_code == 400
    assert "a prompt in the list is too long" in response.json()["error"]["message"]


def test_a_text_that_cannot_be_encoded_is_400(home):
    """Guards against a panic of tiktoken, which is no Exception, where the limit allows long texts.
    """
    limits = dict(MAX_PROMPT_LENGTH=str(2**20), MAX_BODY_SIZE=str(2**21))
    with run_server(home, **limits) as server:
        server.ready()
        for path in ("/generate", "/v1/completions"):
            with requests.Session() as session:
                for _ in range(2):  # on the same connection: it is not lost
                    response = session.post(server.url + path, timeout=WAIT,
                                            json=dict(prompt=" " * 1040000))
                    assert response.status_code == 400
                    message = response.json()["error"]["message"]
                    assert "prompt: the tokenizer cannot encode this text" in message
        assert server.get("/health").ok


MEGABYTE = 2**20 - 200
MANY_ENTRIES = "{" + ",".join(f'"{i}":1' for i in range(MEGABYTE // 10)) + "}"
WRONG_BODIES = {
    "objects for texts": '{"prompt": [' + "{}," * (MEGABYTE // 3) + "{}]}",
    "numbers and a text": '{"prompt": [' + "1," * (MEGABYTE // 2) + '"a"]}',
    "lists and a text": '{"prompt": [' + "[1]," * (MEGABYTE // 4) + '"a"]}',
    "many short prompts": '{"prompt": [' + '"a",' * (MEGABYTE // 4) + '"a"]}',
    "unknown fields": MANY_ENTRIES,
    "wrong stop texts": '{"prompt": "a", "stop": [' + "{}," * (MEGABYTE // 3) + "{}]}",
    "wrong options": '{"prompt": "a", "stream_options": ' + MANY_ENTRIES + "}",
    "a biased vocabulary": '{"prompt": "a", "logit_bias": ' + MANY_ENTRIES + "}",
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_a_megabyte_of_wrong_json_costs_little_memory(server, name):
    """Guards against a list of all errors in a body: it took 1.2 GB, and 6.7 s in which nobody got
    an answer.
    """
    server.post(prompt="warm", max_length=1)
    before = server.metric("process_resident_memory_bytes")
    answers = [in_background(
        requests.post, f"{server.url}/v1/completions", data=WRONG_BODIES[name], timeout=WAIT,
        headers={"Content-Type": "application/json"}) for _ in range(2)]
    for answer in answers:
        response = answer.result(WAIT)
        assert response.status_code == 400
        assert len(response.json()["error"]["message"]) < 600
    assert server.metric("process_resident_memory_bytes") - before < 3e8


def test_echo_copies_a_prompt_only_so_often(server):
    """Guards against a limit that refuses prompts of a whole context."""
    whole_contexts = [[i] * 64 for i in range(4)]
    answer = server.post("/v1/completions", prompt=whole_contexts, n=2, echo=True, max_tokens=1)
    assert answer.ok
    assert len(answer.json()["choices"]) == 8
    long = ["a" * 32768] * 4
    answer = server.post("/v1/completions", prompt=long, n=1, echo=True, max_tokens=1)
    assert answer.ok, "one copy of each prompt is always allowed"


def test_echo_beyond_the_size_of_a_request_is_refused(home):
    """Guards against 20 kB that ask for 37 MB."""
    with run_server(home, MAX_BODY_SIZE="40000") as server:
        server.ready()
        wanted = dict(prompt="a" * 20000, echo=True, max_tokens=1)
        assert server.post("/v1/completions", n=3, **wanted).ok
        answer = server.post("/v1/completions", n=4, **wanted)
        assert answer.status_code == 400
        assert "echo repeats 60000 characters" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "echo"


# -----------------------------------------------------------------------------
# connections


def test_a_client_that_reads_nothing_locks_nobody_out(home, stalled):
    """Guards against sequences that have ended and count until somebody has read their text."""
    code = """
from gptlib.serving import http_server
http_server.OUTPUT_BYTES = 10**5  # the thread of the answer waits for its client
"""
    with run_server(home, code, **LARGE_LIMITS) as server:
        server.ready()
        stalled.connect(("127.0.0.1", server.port))
        send_post(stalled, "/v1/completions", **LARGE)
        server.until(lambda: server.metric("gpt2_prompt_tokens_total") == 8 * 170000)
        server.idle()
        others = server.post("/v1/completions", prompt=["abc"] * 8, max_tokens=1)
        assert others.status_code == 200, others.text


def test_output_without_progress_closes_a_connection(impatient, stalled):
    """Guards against a connection, and its output, that are kept for a client that never reads."""
    stalled.connect(("127.0.0.1", impatient.port))
    send_post(stalled, "/v1/completions", **LARGE)
    assert stalled.recv(100)
    impatient.until(lambda: is_closed(stalled))


def test_a_slow_reader_that_moves_gets_all(impatient):
    """Guards against a limit on the time of an answer: a slow line would be cut off."""
    start = time.monotonic()
    tail = b""
    with socket.create_connection(("127.0.0.1", impatient.port), WAIT) as s:
        send_post(s, "/v1/completions", **LARGE)
        while b"[DONE]" not in tail:
            tail = (tail + s.recv(80000))[-100:]
            time.sleep(0.1)
    assert time.monotonic() - start > 8, "longer than a client may stall"


def test_half_a_request_is_given_up(impatient):
    """Guards against a thousand connections that each send a byte a minute and close the door."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port), WAIT))
                for _ in range(20)]
        for i, s in enumerate(slow):
            s.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Le"[:20 + i])
        for s in slow:
            with contextlib.suppress(ConnectionResetError):
                assert s.recv(10) == b"", "the server closes it"


def test_a_long_queue_needs_no_thread_before_it_fills(home):
    """Guards against ten thousand threads at the start of a server with QUEUE_SIZE=10000."""
    with run_server(home, QUEUE_SIZE="10000") as server:
        server.ready()
        with open(f"/proc/{server.process.pid}/status") as f:
            n_threads = next(int(line.split()[1]) for line in f if line.startswith("Threads"))
        assert n_threads < 50
        answers = [in_background(server.post, prompt="abc", max_length=50) for _ in range(60)]
        assert [a.result(WAIT).status_code for a in answers] == [200] * 60


# -----------------------------------------------------------------------------
# a model that hangs or fails

HANGS = """
import threading
from gptlib.inference import engine
step = engine.Engine.step
def hanging(self):
    if any(3 in s.prompt for s in self.live):
        threading.Event().wait()
    return step(self)
engine.Engine.step = hanging
"""


def test_a_model_that_hangs_is_told_and_ends(home):
    """Guards against clients that wait for ever, and a supervisor that sees a healthy server."""
    with run_server(home, HANGS, REQUEST_TIMEOUT="3", STEP_TIMEOUT="2") as server:
        server.ready()
        waiting = in_background(server.post, prompt="abc", max_length=LONG)
        streamed = server.post(prompt="\x03", max_length=5, stream=True)
        told = [json.loads(line[6:]) for line in streamed.iter_lines() if line]
        assert "not done within 3 seconds" in told[-1]["error"]["message"]
        assert waiting.result(WAIT).status_code == 504
        server.until(lambda: server.get("/health").status_code == 503)
        assert server.get("/health").json()["status"] == "hung"
        late = server.post(prompt="abc")
        assert late.status_code == 503
        assert "the model has not answered for 2 seconds" in late.json()["error"]["message"]
        assert server.stop() == 1
        assert "the model hangs" in server.log()


FAILS = """
from gptlib.inference.kv_cache import KVCache
fill = KVCache.from_start
def failing(self):
    if not train_gpt2_is_well(): raise RuntimeError("an illegal memory access was encountered")
    return fill(self)
def train_gpt2_is_well():
    from pathlib import Path
    return not Path("broken").exists()
KVCache.from_start = failing
"""


FAILS_ALTOGETHER = """
from gptlib.inference import engine
retire = engine.Engine._retire_finished
def failing(self):
    if any(3 in s.prompt for s in self.waiting):
        raise RuntimeError("an illegal memory access was encountered")
    retire(self)
engine.Engine._retire_finished = failing
"""


def test_steps_that_fail_before_a_sequence_has_a_slot_are_told(home):
    """Guards against steps that fail without end for a sequence that waits, while /health says 200.
    """
    with run_server(home, FAILS_ALTOGETHER) as server:
        server.ready()
        in_background(server.post, prompt="\x03")
        server.until(lambda: server.get("/health").json()["status"] == "failing")


def test_a_model_that_fails_again_and_again_is_told(home):
    """Guards against a CUDA error that stays: every request got 500, and /health said 200; and
    against one request of eight samples, or one step, that counts eight times."""
    (home / "broken").unlink(missing_ok=True)
    with run_server(home, FAILS) as server:
        server.ready()
        (home / "broken").touch()
        try:
            for i in range(8):
                assert server.get("/health").status_code == 200, "one failure is no reason to stop"
                failed = server.post(prompt=f"abc {i}", max_length=2, num_samples=8 - i)
                assert failed.status_code == 500
            health = server.get("/health")
            assert health.status_code == 503
            assert health.json()["status"] == "failing"
        finally:
            (home / "broken").unlink()
        assert server.post(prompt="abc", max_length=2).ok
        assert server.get("/health").ok, "it has recovered"
        assert server.stop() == 0
