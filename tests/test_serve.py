"""The server as its clients see it: a real process, a real socket, and everything that can go wrong between them.

    python -m pytest tests/test_serve.py

The pages are tried in headless Chromium where there is one (Debian: chromium and chromium-driver).
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
import torch
from conftest import ROOT, command, environment
from hypothesis import HealthCheck, given, settings, strategies as st

import serve
from gptlib.common import UserError
from gptlib.tokenizer import make_encoding, tokenizer_to_dict
from inference import generate_text
from serve import Settings, read_settings
from gptlib.config import shown_default
from train_gpt2 import GPT, GPTConfig
from gptlib.api import VERSION

CONFIG = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
LONG = 50000  # tokens: more than anybody waits for here
WAIT = 30  # seconds: what takes longer hangs
SMALL = dict(SLOTS="4", QUEUE_SIZE="4", MAX_LENGTH_LIMIT=str(LONG), DTYPE="float32", DEVICE="cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        model.transformer.wte.weight[256] = 0  # it hardly ever ends by itself
        model.transformer.wte.weight[128:] *= 0.1  # and mostly writes ASCII
    model.tokenizer = make_encoding("bpe", {bytes([i]): i for i in range(256)})
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def home(model, tmp_path_factory):
    """A directory with log/model_40000.pt, as a run leaves it."""
    home = tmp_path_factory.mktemp("home")
    (home / "log").mkdir()
    torch.save(dict(model=model.state_dict(), config=dataclasses.asdict(CONFIG), step=40000, train_config={},
                    tokenizer=tokenizer_to_dict(model.tokenizer)), home / "log" / "model_40000.pt")
    (home / "log" / "latest_checkpoint.pt").symlink_to("model_40000.pt")
    return home


class Server:
    """A server process; `code` is run in it before it starts."""

    def __init__(self, home, code="", argv=None, **env):
        argv = argv or [sys.executable, "-c", f"import inference, serve, sys, time\n{code}\nserve.run_main(serve.main)"]
        env = {"PORT": "0", **SMALL, **env}
        self.process = subprocess.Popen(argv, cwd=home, env={**environment(), **env, "PYTHONPATH": str(ROOT)}, text=True,
                                        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.lines, self.headers = [], {"X-API-Key": env.get("API_KEY", "")}
        for pipe in (self.process.stderr, self.process.stdout):
            threading.Thread(target=lambda pipe=pipe: self.lines.extend(iter(pipe.readline, "")), daemon=True).start()
        match = self.wait_for(r"(?:listening on|Listening at:) http://127\.0\.0\.1:(\d+)")
        self.port = int(match[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern):
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if match := re.search(pattern, self.log()):
                return match
            assert self.process.poll() is None, self.log()
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in: {self.log()}")

    def log(self):
        return "".join(list(self.lines))

    def ready(self):
        self.until(lambda: requests.get(f"{self.url}/health", timeout=WAIT).status_code == 200)
        return self

    @staticmethod
    def until(true):
        end = time.monotonic() + WAIT
        while not true():
            assert time.monotonic() < end, "hung"
            time.sleep(0.02)

    def get(self, path, **how):
        return requests.get(self.url + path, headers=self.headers, timeout=WAIT, **how)

    def post(self, path="/generate", stream=False, headers=None, **body):
        return requests.post(self.url + path, json=body | (dict(stream=True) if stream else {}), stream=stream,
                             timeout=WAIT, headers=headers or self.headers)

    def metric(self, name, **labels):
        """The sum of a metric over those of its lines that have these labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if re.match(name + r"[{ ]", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(f'{k}="{v}"' in line for k, v in labels.items()))

    def idle(self):
        self.until(lambda: self.metric("gpt2_slots_in_use") == 0)

    def stop(self):
        """SIGTERM; the exit code, when the whole process group is gone."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WAIT)
        with pytest.raises(ProcessLookupError):  # no orphan
            os.killpg(self.process.pid, 0)
        return code


@contextlib.contextmanager
def serving(*args, **env):
    server = Server(*args, **env)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


@pytest.fixture(scope="module")
def server(home):
    with serving(home) as server:
        yield server.ready()


def events(response):
    """The server-sent events of a response, without the [DONE] that has to be the last."""
    data = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert data[-1] == b"[DONE]"
    return [json.loads(event) for event in data[:-1]]


def in_background(function, *args, **how):
    """A Future of function(), run in a thread that does not keep the tests alive."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(function(*args, **how))
        except Exception as error:
            future.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return future


# -----------------------------------------------------------------------------
# the contract


def test_the_two_lines_of_the_manual_work_as_they_stand(home):
    for port in (5000, 8080):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"something else has port {port} here")
    (home / "serve.py").unlink(missing_ok=True)
    (home / "serve.py").symlink_to(ROOT / "serve.py")
    lines = ["PORT=8080 MODEL_CHECKPOINT=log/model_40000.pt python serve.py", "python serve.py"]
    curl = ("""curl -X POST http://localhost:5000/generate -H "Content-Type: application/json" """
            """-d '{"prompt": "The future of AI is", "max_length": 100, "temperature": 0.8, "top_k": 50}'""")
    env = {**environment(), "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"]}
    processes = [subprocess.Popen(["bash", "-c", "exec env " + line], cwd=home, env=env, stderr=subprocess.DEVNULL)
                 for line in lines]
    try:
        for port in (5000, 8080):
            def healthy(port=port):
                with contextlib.suppress(requests.ConnectionError):
                    return requests.get(f"http://127.0.0.1:{port}/health", timeout=WAIT).json()["status"] == "healthy"
            Server.until(healthy)
        found = subprocess.run(["bash", "-c", curl], capture_output=True, timeout=WAIT)
        answer = json.loads(found.stdout)
        assert answer["prompt"] == "The future of AI is" and answer["generated_text"].startswith(answer["prompt"])
        assert answer["tokens_generated"] == 100 and answer["finish_reason"] == "length"
        assert requests.post("http://127.0.0.1:8080/generate", json=dict(prompt="x"), timeout=WAIT).ok
    finally:
        for p in processes:
            p.send_signal(signal.SIGINT)
        assert [p.wait(WAIT) for p in processes] == [0, 0]


def test_greedy_text_is_the_models_own_alone_and_in_a_crowd(server, model):
    expected = {n: generate_text(model, "a b" * n, max_length=20 + 20 * n, temperature=0, top_k=None) for n in range(1, 9)}
    found = {n: in_background(server.post, prompt="a b" * n, max_length=20 + 20 * n, temperature=0) for n in expected}
    for n, future in found.items():
        answer = future.result(WAIT).json()
        assert answer["generated_text"] == expected[n]
        assert (answer["tokens_generated"], answer["prompt_tokens"]) == (20 + 20 * n, 3 * n)


def test_only_the_prompt_is_required_and_seeds_repeat(server):
    first = server.post(prompt="abc").json()
    assert first["tokens_generated"] == 100 and first["model"] == "model_40000"
    again = server.post(prompt="abc", seed=first["seed"]).json()
    assert again == first
    assert server.post(prompt="abc").json()["generated_text"] != first["generated_text"]
    assert server.post(prompt="", max_length=3).json()["prompt_tokens"] == 1


def test_samples_stop_texts_and_streams_agree(server):
    how = dict(prompt="xyz", max_length=60, seed=5, num_samples=3)
    whole = server.post(**how).json()
    assert [s["seed"] for s in whole["samples"]] == [5, 6, 7]
    assert whole["samples"][0]["generated_text"] == whole["generated_text"]
    assert len({s["generated_text"] for s in whole["samples"]}) == 3
    response = server.post(stream=True, **how)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    sent = events(response)
    for i, sample in enumerate(whole["samples"]):
        mine = [e for e in sent if e["index"] == i]
        assert "xyz" + "".join(e["text"] for e in mine) == sample["generated_text"]
        assert {k: mine[-1][k] for k in sample} == sample and len(mine) > 10
    text = whole["generated_text"][3:]
    stopped = server.post(prompt="xyz", max_length=60, seed=5, stop=["never there", text[20:23]]).json()
    assert stopped["generated_text"] == "xyz" + text[:text.find(text[20:23])] and stopped["finish_reason"] == "stop"


ERRORS = [
    (dict(prompt="a", max_length=0), "max_length is 0: expected a whole number from 1 to 50000"),
    (dict(prompt="a", max_length=50001), "max_length is 50001: expected a whole number from 1 to 50000"),
    (dict(prompt="a", max_length=True), "max_length is true: expected a whole number"),
    (dict(prompt="a", max_length=5.0), "max_length is 5.0: expected a whole number"),
    (dict(prompt="a", max_length="5"), 'max_length is "5": expected a whole number'),
    (dict(prompt="a", max_length=None), "max_length is null: expected"),
    (dict(prompt="a", temperature=float("nan")), "temperature is NaN: expected a number from 0 to 2: 0 is greedy"),
    (dict(prompt="a", temperature=float("inf")), "temperature is Infinity: expected a number from 0 to 2: 0 is greedy"),
    (dict(prompt="a", temperature=-0.1), "temperature is -0.1: expected a number from 0 to 2: 0 is greedy"),
    (dict(prompt="a", temperature=False), "temperature is false: expected"),
    (dict(prompt="a", top_p=0), "top_p is 0: expected a number above 0 and up to 1"),
    (dict(prompt="a", top_k=0), "top_k is 0: expected a whole number from 1 to"),
    (dict(prompt="a", seed=-1), "seed is -1: expected a whole number from 0 to 9223372036854775807"),
    (dict(prompt="a", num_samples=9), "num_samples is 9: expected a whole number from 1 to 8"),
    (dict(prompt="a", stop=[""]), 'stop is [""]: expected a text of 1 to 200 characters'),
    (dict(prompt="a", stream="yes"), 'stream is "yes": expected true or false'),
    (dict(prompt=5), "prompt is 5: expected a text of at most 32768 characters"),
    (dict(prompt="a" * 32769), "expected a text of at most 32768 characters"),
    (dict(), "prompt is missing: expected a text"),
    (dict(prompt="a", checkpoint="/etc/passwd"), "unknown field 'checkpoint': expected top_p, seed"),
    ([], "the body is not a JSON object"),
    ("{", "the body is not valid JSON"),
    ('{"prompt": "\\ud800"}', "the body is not valid JSON"),
]


@pytest.mark.parametrize("body, message", ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_mistakes_are_told_by_field_and_range(server, body, message):
    data = body if isinstance(body, str) else json.dumps(body)
    response = requests.post(f"{server.url}/generate", data=data, headers={"Content-Type": "application/json"}, timeout=WAIT)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_wrong_routes_methods_and_content_types(server):
    assert server.get("/nowhere").status_code == 404 and server.get("/nowhere").json()["error"]["message"]
    response = server.get("/generate")
    assert response.status_code == 405 and "POST" in response.headers["Allow"] and response.json()["error"]["message"]
    response = requests.post(f"{server.url}/generate", data='{"prompt": "a"}', headers={"Content-Type": "text/plain"},
                             timeout=WAIT)
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as s:
        s.sendall(b"no http at all\r\n\r\n")
        assert json.loads(s.makefile("rb").read().split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_health_and_metrics_say_what_there_is(server, model):
    health = server.get("/health").json()
    expected = dict(status="healthy", model="model_40000", step=40000, device="cpu", dtype="float32", slots=4, context=64,
                    parameters=sum(p.numel() for p in model.parameters()), key_required=False, version=VERSION)
    assert {k: health[k] for k in expected} == expected
    before = server.metric("gpt2_generated_tokens_total"), server.metric("gpt2_http_requests_total", route="/generate")
    server.post(prompt="abc", max_length=7)
    server.post(prompt="abc", max_length=-7)
    assert server.metric("gpt2_generated_tokens_total") == before[0] + 7
    assert server.metric("gpt2_http_requests_total", route="/generate") == before[1] + 2
    assert server.metric("gpt2_time_to_first_token_seconds_count") > 0
    assert server.metric("gpt2_http_request_duration_seconds_count", route="/generate") > 0
    assert server.metric("gpt2_slots") == 4 and server.metric("gpt2_queue_sequences") == 0
    for line in server.get("/metrics").text.splitlines():  # counters end in _total, base units, one prefix
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name.startswith(("gpt2_", "process_")) and (kind != "counter" or name.endswith("_total")), line
            assert not re.search("milli|_ms|_mb|minutes", name)


# -----------------------------------------------------------------------------
# OpenAI's own client


def test_the_openai_package_completes_streams_lists_and_raises(server, model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [m.id for m in client.models.list()] == ["model_40000"]
    assert client.models.retrieve("model_40000").id == "model_40000"
    greedy = generate_text(model, "abc", max_length=16, temperature=0, top_k=None)[3:]
    answer = client.completions.create(model="model_40000", prompt="abc", temperature=0)
    assert answer.choices[0].text == greedy and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 16, 19)
    assert client.completions.create(model="model_40000", prompt=list(b"abc"), temperature=0).choices[0].text == greedy
    chunks = list(client.completions.create(model="model_40000", prompt="abc", temperature=0, stream=True, echo=True,
                                            stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "abc" + greedy
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 16
    several = client.completions.create(model="model_40000", prompt=["ab", "abc"], n=2, max_tokens=9, seed=1, stop="\n\n",
                                        user="me", top_p=0.9, echo=True)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert [c.text[:3] for c in several.choices[2:]] == ["abc", "abc"]
    assert several.usage.prompt_tokens == 5 and several.choices[0].text != several.choices[1].text
    assert client.completions.create(model="model_40000", prompt=[[1, 2], [3]]).usage.prompt_tokens == 3
    for wrong, message in ((dict(temperature=3), "from 0 to 2: 0 is greedy"), (dict(logprobs=2), "not supported"),
                           (dict(best_of=4), "not supported"), (dict(max_tokens=0), "from 1 to 50000"),
                           (dict(prompt=[300]), "token id out of range"), (dict(prompt=[]), "prompt is an empty list"),
                           (dict(prompt=["a"] * 5, n=2), "prompt makes 10 sequences"),
                           (dict(prompt=["a", "a" * 32769]), "at most 32768 characters")):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)) as e:
            client.completions.create(**{**dict(model="model_40000", prompt="abc"), **wrong})
        assert e.value.param in wrong
    with pytest.raises(openai.NotFoundError) as e:
        client.completions.create(model="gpt-9", prompt="abc")
    assert e.value.code == "model_not_found"


# -----------------------------------------------------------------------------
# load and faults


def test_a_short_request_is_answered_long_before_a_long_one(server):
    long = server.post(stream=True, prompt="long", max_length=LONG)
    lines = long.iter_lines()
    next(lines)
    for _ in range(3):
        assert server.post(prompt="short", max_length=5).json()["tokens_generated"] == 5
    assert server.metric("gpt2_slots_in_use") == 1 and next(lines) is not None
    long.close()
    server.idle()


def test_more_requests_than_room_get_429_and_none_is_lost_or_hangs(server):
    answers = [in_background(server.post, prompt="abc", max_length=400, seed=i) for i in range(40)]
    answers = [a.result(WAIT) for a in answers]
    refused = [a for a in answers if a.status_code == 429]
    served = [a for a in answers if a.status_code == 200]
    assert len(served) + len(refused) == 40 and len(served) >= 8 and refused
    assert all(int(a.headers["Retry-After"]) >= 1 and "queue is full" in a.json()["error"]["message"] for a in refused)
    assert all(a.json()["tokens_generated"] == 400 for a in served)
    assert len({a.json()["generated_text"] for a in served}) == len(served)
    assert server.metric("gpt2_slots_in_use") == server.metric("gpt2_queue_sequences") == 0
    assert server.post(prompt="abc", max_length=2).ok


def hostile_bodies(path, description):
    """Bodies near those the description of a route allows: right and wrong values of its fields, and bytes that are none."""
    ref = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = description["components"]["schemas"][ref.rsplit("/", 1)[1]]["properties"]
    right = dict(prompt=st.text(max_size=80), max_length=st.just(2), max_tokens=st.just(2), temperature=st.floats(0, 2),
                 top_k=st.integers(1, 300), top_p=st.floats(0.01, 1), seed=st.integers(0, 2**40), stream=st.booleans(),
                 echo=st.booleans(), n=st.integers(1, 4), stop=st.lists(st.text(min_size=1, max_size=5), max_size=4))
    always = {k: right[k] for k in ("prompt", "max_length", "max_tokens") if k in fields}
    good = st.fixed_dictionaries(always, optional={k: v for k, v in right.items() if k in fields and k not in always})
    scalar = st.one_of(st.none(), st.booleans(), st.integers(max_value=-1), st.integers(min_value=10**6), st.floats(),
                       st.text(), st.sampled_from([10**400, 1e308, -0.0, "\x00", "\ud800", "NaN", "../../etc/passwd"]))
    wrong = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
                         max_leaves=5)
    bad = st.builds(lambda body, field, value: {**body, field: value}, good, st.sampled_from([*fields, "unknown"]), wrong)
    text = st.one_of(good, bad, bad, wrong).map(lambda body: json.dumps(body).encode())
    cut = st.builds(lambda t, n: t[:n % (len(t) + 1)], text, st.integers(0, 200))
    return st.one_of(text, text, text, text, cut, st.binary(max_size=60), st.sampled_from([
        b"[" * 50000, b'{"prompt":' * 3000, b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}"]))


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_hundred_hostile_bodies_a_route_never_make_a_500_or_a_dead_engine(server, path):
    seen = {}

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_bodies(path, server.get("/openapi.json").json()))
    def send(body):
        response = requests.post(server.url + path, data=body, headers={"Content-Type": "application/json"}, timeout=WAIT)
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (body, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"]
        assert "Traceback" not in response.text and '"server_error"' not in response.text

    send()
    assert seen[200] >= 10 and seen[400] >= 30, seen  # both sides of the border were tried
    assert server.post(prompt="abc", max_length=5).json()["tokens_generated"] == 5
    assert server.metric("gpt2_sequences_total", finish_reason="error") == 0 and "Traceback" not in server.log()


def test_slow_bodies_hold_no_thread(server):
    """Thrice as many clients as there are threads send a byte a second; the others do not notice."""
    body = b'{"prompt": "slow", "max_length": 3}'
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), WAIT)) for _ in range(48)]
        for s in slow:
            s.sendall(head)
        for i in range(3):
            for s in slow:
                s.sendall(body[i:i + 1])
            assert server.post(prompt="fast", max_length=3).ok
            time.sleep(1)
        slow[0].sendall(body[3:])
        assert b"200 OK" in slow[0].recv(1000)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes_is_413(server, chunked):
    body = b'{"prompt": "' + b"a" * 10**7 + b'"}'
    for _ in range(3):
        response = requests.post(f"{server.url}/generate", data=iter([body]) if chunked else body, timeout=WAIT,
                                 headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and "1048577" in response.json()["error"]["message"]
    assert server.post(prompt="abc", max_length=2).ok


def test_thousands_of_short_requests_leave_memory_flat(server):
    def some(n):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        for i in range(n):
            path, body = (("/generate", dict(prompt="abc" * (i % 7), max_length=2, stream=i % 5 == 0)),
                          ("/v1/completions", dict(prompt="abc", max_tokens=2)))[i % 2]
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200 and response.read()

    def wave(n):
        for future in [in_background(some, n // 8) for _ in range(8)]:
            future.result(10 * WAIT)
        return server.metric("process_resident_memory_bytes")

    before = wave(800)
    assert wave(2400) - before < 4e6


FAULTS = """
import torch, train_gpt2
from gptlib import engine
hidden, step = train_gpt2.GPT.hidden, engine.Engine.step
def fragile(self, idx, cache=None, pos=None):
    if 1 in idx and pos is None: raise RuntimeError("secret: no memory for this prompt")
    return hidden(self, idx, cache, pos)
def slow(self):
    if any(2 in r.prompt for r in self.live): raise RuntimeError("secret: the device is gone")
    time.sleep(0.02)
    return step(self)
train_gpt2.GPT.hidden, engine.Engine.step = fragile, slow
"""


@pytest.fixture(scope="module")
def faulty(home):
    """Takes 20 ms a token; the byte 1 in a prompt breaks its own forward pass, 2 the engine's step with all in it."""
    with serving(home, FAULTS, MAX_BODY_SIZE="3000", REQUEST_TIMEOUT="6") as server:
        yield server.ready()


def test_a_request_that_fails_in_the_engine_gets_500_and_the_others_go_on(faulty, model):
    expected = generate_text(model, "good", max_length=50, temperature=0, top_k=None)
    others = [in_background(faulty.post, prompt="good", max_length=50, temperature=0) for _ in range(3)]
    faulty.until(lambda: faulty.metric("gpt2_slots_in_use") == 3)
    for stream in (False, True):
        bad = faulty.post(prompt="bad \x01", stream=stream)
        assert bad.status_code == 500 and "secret" not in bad.text and "Traceback" not in bad.text
    assert [o.result(WAIT).json()["generated_text"] for o in others] == [expected] * 3
    assert "secret: no memory for this prompt" in faulty.log()
    assert faulty.metric("gpt2_sequences_total", finish_reason="error") >= 2


def test_an_engine_that_fails_as_a_whole_loses_those_it_had_and_serves_those_that_come(faulty):
    other = faulty.post(prompt="good", max_length=100, stream=True)
    lines = other.iter_lines()
    next(lines)
    assert faulty.post(prompt="\x02").status_code == 500
    told = [json.loads(line[6:]) for line in lines if line]
    assert told[-1]["error"]["type"] == "server_error" and "secret" not in str(told)
    assert faulty.post(prompt="good", max_length=5).json()["tokens_generated"] == 5
    assert faulty.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_within_a_token(faulty, stream):
    faulty.idle()
    before = faulty.metric("gpt2_generated_tokens_total")
    cancelled = faulty.metric("gpt2_sequences_total", finish_reason="cancelled")
    body = json.dumps(dict(prompt="abc", max_length=LONG, stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", faulty.port), WAIT) as s:
        s.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                  % len(body) + body)
        received = b""
        while stream and received.count(b"data: ") < 10:
            received += s.recv(10000)
        faulty.until(lambda: stream or faulty.metric("gpt2_slots_in_use") == 1)
    faulty.until(lambda: faulty.metric("gpt2_sequences_total", finish_reason="cancelled") == cancelled + 1)
    faulty.idle()
    tokens = faulty.metric("gpt2_generated_tokens_total") - before
    assert tokens <= received.count(b"data: ") + 25  # of 50,000; half a second's worth, for a machine that is busy


def test_what_is_not_done_in_time_gets_504(faulty):
    started = time.monotonic()
    waiting = in_background(faulty.post, prompt="abc", max_length=LONG)
    streamed = faulty.post(prompt="abc", max_length=LONG, stream=True)
    told = [json.loads(line[6:]) for line in streamed.iter_lines() if line]
    assert "6 seconds" in told[-1]["error"]["message"] and len(told) > 20
    assert waiting.result(WAIT).status_code == 504 and "REQUEST_TIMEOUT" in waiting.result().json()["error"]["message"]
    assert time.monotonic() - started >= 6
    faulty.idle()


def test_loading_then_sigterm_with_requests_in_flight(home):
    code = FAULTS + "load = serve.load_for_sampling\n" \
        "serve.load_for_sampling = lambda *a: (time.sleep(1), load(*a))[1]"
    with serving(home, code, SLOTS="1") as server:
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert server.post(prompt="early").status_code == 503 and "Retry-After" in server.post(prompt="early").headers
        assert server.get("/").status_code == 200
        server.ready()
        running = in_background(server.post, prompt="abc", max_length=100)
        streamed = server.post(stream=True, prompt="abc", max_length=50)  # waits for the only slot
        waiting = in_background(server.post, prompt="abc", max_length=3)
        server.until(lambda: server.metric("gpt2_queue_sequences") == 1)
        exited = in_background(server.stop)
        server.until(lambda: server.get("/health").json()["status"] == "draining")
        late = server.post(prompt="late")
        assert late.status_code == 503 and "draining" in late.json()["error"]["message"] and "Retry-After" in late.headers
        assert events(streamed)[-1]["tokens_generated"] == 50
        assert running.result(WAIT).json()["tokens_generated"] == 100
        assert waiting.result(WAIT).json()["tokens_generated"] == 3
        assert exited.result(WAIT) == 0
        with pytest.raises(requests.ConnectionError):
            server.get("/health")


# -----------------------------------------------------------------------------
# keys, rates, other servers


@pytest.fixture(scope="module")
def guarded(home):
    with serving(home, API_KEY="s3crét", RATE_LIMIT="6 per minute", MODEL_NAME="mine") as server:
        server.headers = {"X-API-Key": "s3crét".encode()}
        yield server.ready()


def test_a_key_is_needed_everywhere_but_for_health_and_the_page(guarded):
    for path in ("/health", "/"):
        assert requests.get(guarded.url + path, timeout=WAIT).status_code == 200
    wrong = [{}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer s3cr"}, {"Authorization": "Basic czNjcmV0"},
             {"X-API-Key": b"\xff\xfe"}]
    for headers in wrong:
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nowhere"):
            response = requests.get(guarded.url + path, headers=headers, timeout=WAIT)
            assert response.status_code == 401 and "API key" in response.json()["error"]["message"]
        assert guarded.post(prompt="a", headers={"X-API-Key": "", **headers}).status_code == 401
    assert guarded.get("/v1/models").json()["data"][0]["id"] == "mine"
    bearer = {"Authorization": "Bearer s3crét".encode()}
    assert requests.get(f"{guarded.url}/metrics", headers=bearer, timeout=WAIT).ok
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_rate_limit_is_met_with_429(guarded):
    answers = [guarded.post(prompt="a", max_length=1) for _ in range(7)]
    assert [a.status_code for a in answers] == [200] * 6 + [429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60 and "6 per 1 minute" in answers[-1].json()["error"]["message"]
    assert guarded.get("/health").ok


def test_gunicorn_serves_drains_and_notices_who_goes_away(home):
    argv = [sys.executable, "-m", "gunicorn", "serve:app", "--worker-class", "gthread", "--workers", "1", "--threads", "16",
            "--timeout", "0", "--graceful-timeout", "20", "--bind", "127.0.0.1:0"]
    with serving(home, argv=argv) as server:
        server.ready()
        assert server.post(prompt="abc", max_length=5).json()["tokens_generated"] == 5
        long = server.post(stream=True, prompt="abc", max_length=LONG)
        lines = long.iter_lines()
        assert next(lines) and server.metric("gpt2_slots_in_use") == 1
        long.close()
        server.idle()
        with pytest.raises(requests.Timeout):  # not a stream: it hangs up before there is anything to read
            requests.post(f"{server.url}/generate", json=dict(prompt="abc", max_length=LONG), timeout=0.5)
        server.idle()
        assert server.post(data="x" * 2 * 10**6).status_code == 413
        running = in_background(server.post, prompt="abc", max_length=2000)
        server.until(lambda: server.metric("gpt2_slots_in_use") == 1)
        assert server.stop() == 0
        assert running.result(WAIT).json()["tokens_generated"] == 2000


# -----------------------------------------------------------------------------
# the command


def test_settings_come_from_the_environment_and_flags_override():
    found = read_settings(["--port", "7", "--slots=2"], dict(PORT="8080", HOST="::1", COMPILE="1", REQUEST_TIMEOUT="2.5"))
    assert found == Settings(port=7, slots=2, host="::1", compile=True, request_timeout=2.5)
    assert read_settings([], {"PORT": ""}) == Settings() == read_settings(["--api_key="], {"API_KEY": "x"})
    for env, message in ((dict(PORT="x"), "PORT is 'x': expected a whole number"),
                         (dict(PORT="-1"), "PORT is -1: expected 0 to 65535"), (dict(SLOTS="0"), "SLOTS is 0"),
                         (dict(REQUEST_TIMEOUT="nan"), "REQUEST_TIMEOUT is nan"),
                         (dict(COMPILE="perhaps"), "true or false"), (dict(DTYPE="int4"), "choose one of auto")):
        with pytest.raises(UserError, match=re.escape(message)):
            read_settings([], env)
    with pytest.raises(UserError, match="RATE_LIMIT is 'often'"):
        serve.create_app(Settings(rate_limit="often"))


def test_mistakes_on_the_command_line_end_with_one_line_and_code_1(home, server):
    for args, message in (([f"--port={server.port}"], f"error: cannot listen on 127.0.0.1 port {server.port} (Addr"),
                          (["--model_checkpoint=log/none.pt", "--port=0"], "error: no checkpoint 'log/none.pt'"),
                          (["--prot=1"], "(did you mean --port?)")):
        found = subprocess.run(command("serve.py", *args), cwd=home, env=environment(), text=True, capture_output=True,
                               timeout=WAIT)
        assert found.returncode == 1 and message in found.stderr and "Traceback" not in found.stderr


def test_importing_it_starts_nothing_and_loads_no_server():
    code = ("import sys, threading, serve; print(threading.active_count(), "
            "*set(sys.modules) & {'flask', 'pydantic', 'waitress', 'prometheus_client', 'flask_limiter'})")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert (found.stdout, found.stderr) == ("1\n", "")


def test_the_readme_has_every_setting():
    readme = (ROOT / "README.md").read_text()
    for f in dataclasses.fields(Settings):
        row = f"| `{f.name.upper()}` | {shown_default(f)} | {f.metadata['help']} |"
        assert row in readme, f"the README's table lacks: {row}"


# -----------------------------------------------------------------------------
# the page


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync",
                     "disable-background-networking", "disable-component-update", "disable-quic"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.implicitly_wait(5)
    yield browser
    browser.quit()


def test_the_page_writes_stops_and_fits_a_phone(browser, server):
    def find(id):
        return browser.find_element("id", id)

    for width, scheme in ((390, "dark"), (1000, "light")):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=800, deviceScaleFactor=1,
                                                                            mobile=width < 500))
        features = [dict(name="prefers-color-scheme", value=scheme)]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=features))
        browser.get(server.url)
        server.until(lambda: "model_40000 at step 40,000" in find("about").text)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor").count("251") == 0
        assert dark == (scheme == "dark")
    assert not find("key").is_displayed()
    find("prompt").clear()
    find("prompt").send_keys("Hello <b>you</b>")
    find("seed").send_keys("3")
    find("go").click()
    server.until(lambda: "100 tokens in" in find("status").text)
    expected = server.post(prompt="Hello <b>you</b>", seed=3).json()["generated_text"]
    assert browser.execute_script("return document.getElementById('text').textContent") == expected
    browser.execute_script("const e = document.getElementById('max_length'); e.value = e.max; e.oninput()")
    find("go").click()
    server.until(lambda: server.metric("gpt2_slots_in_use") == 1 and len(find("text").text) > 30)
    find("stop").click()
    server.until(lambda: find("status").text == "stopped")
    server.idle()
    browser.execute_script("const e = document.getElementById('temperature'); e.max = 9; e.value = 9")
    find("go").click()
    server.until(lambda: "temperature is 9: expected a number from 0" in find("status").text)
    severe = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
    assert not severe  # nothing blocked, nothing missing


def test_the_page_asks_for_the_key_where_one_is_needed(browser, guarded):
    browser.get(guarded.url)
    guarded.until(lambda: browser.find_element("id", "key").is_displayed())
    browser.find_element("id", "go").click()
    guarded.until(lambda: "the API key is missing or wrong" in browser.find_element("id", "status").text)
