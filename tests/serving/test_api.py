"""The HTTP interface as clients see it: bodies, answers, errors, OpenAI's contract.

python -m pytest tests/serving/test_api.py
"""

import dataclasses
import gzip
import json
import re
import socket

import pytest
import requests
import serving_helpers as serving
from hypothesis import HealthCheck, given, settings, strategies as st
from serving_helpers import WAIT, events

from gptlib.inference.sampling import SamplingParams
from inference import generate_text

model, home, server = serving.model, serving.home, serving.server


def test_only_the_prompt_is_required_and_seeds_repeat(server):
    """Guards against lost defaults, and against answers whose seed does not repeat them."""
    first = server.post(prompt="abc").json()
    assert first["tokens_generated"] == 100
    assert first["model"] == "model_40000"
    again = server.post(prompt="abc", seed=first["seed"]).json()
    assert again == first
    assert server.post(prompt="abc").json()["generated_text"] != first["generated_text"]
    assert server.post(prompt="", max_length=3).json()["prompt_tokens"] == 1


def test_samples_stop_texts_and_streams_agree(server):
    """Guards against a stream whose text differs from that of the answer in one piece."""
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
        assert {k: mine[-1][k] for k in sample} == sample
        assert len(mine) > 10
    text = whole["generated_text"][3:]
    stopped = server.post(
        prompt="xyz", max_length=60, seed=5, stop=["never there", text[20:23]]
    ).json()
    assert stopped["generated_text"] == "xyz" + text[: text.find(text[20:23])]
    assert stopped["finish_reason"] == "stop"


ERRORS = [
    (dict(prompt="a", max_length=0), "max_length is 0: expected a whole number from 1 to 50000"),
    (dict(prompt="a", max_length=50001),
     "max_length is 50001: expected a whole number from 1 to 50000"),
    (dict(prompt="a", max_length=True), "max_length is true: expected a whole number"),
    (dict(prompt="a", max_length=5.0), "max_length is 5.0: expected a whole number"),
    (dict(prompt="a", max_length="5"), 'max_length is "5": expected a whole number'),
    (dict(prompt="a", max_length=None), "max_length is null: expected"),
    (dict(prompt="a", temperature=float("nan")),
     "temperature is NaN: expected a number from 0 to 2: 0 is greedy"),
    (dict(prompt="a", temperature=float("inf")),
     "temperature is Infinity: expected a number from 0 to 2: 0 is greedy"),
    (dict(prompt="a", temperature=-0.1),
     "temperature is -0.1: expected a number from 0 to 2: 0 is greedy"),
    (dict(prompt="a", temperature=False), "temperature is false: expected"),
    (dict(prompt="a", top_p=0), "top_p is 0: expected a number above 0 and up to 1"),
    (dict(prompt="a", top_k=0), "top_k is 0: expected a whole number from 1 to"),
    (dict(prompt="a", seed=-1),
     "seed is -1: expected a whole number from 0 to 9223372036854775807"),
    (dict(prompt="a", num_samples=9), "num_samples is 9: expected a whole number from 1 to 8"),
    (dict(prompt="a", stop=[""]), 'stop is [""]: expected a text of 1 to 200 characters'),
    (dict(prompt="a", stream="yes"), 'stream is "yes": expected true or false'),
    (dict(prompt=5), "prompt is 5: expected a text of at most 32768 characters"),
    (dict(prompt="a" * 32769), "expected a text of at most 32768 characters"),
    (dict(), "prompt is missing: expected a text"),
    (dict(prompt="a", checkpoint="/etc/passwd"),
     "unknown field 'checkpoint': expected top_p, seed"),
    ([], "the body is not a JSON object"),
    ("{", "the body is not valid JSON"),
    ('{"prompt": "\\ud800"}', "the body is not valid JSON"),
]


@pytest.mark.parametrize("body, message", ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors_name_the_field_and_its_range(server, body, message):
    """Guards against wrong values that are accepted, or refused without saying why."""
    data = body if isinstance(body, str) else json.dumps(body)
    response = requests.post(
        f"{server.url}/generate",
        data=data,
        headers={"Content-Type": "application/json"},
        timeout=WAIT,
    )
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_wrong_routes_methods_and_content_types(server):
    """Guards against errors in HTML, or without the headers that their status requires."""
    assert server.get("/nowhere").status_code == 404
    assert server.get("/nowhere").json()["error"]["message"]
    response = server.get("/generate")
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]
    assert response.json()["error"]["message"]
    response = requests.post(
        f"{server.url}/generate",
        data='{"prompt": "a"}',
        headers={"Content-Type": "text/plain"},
        timeout=WAIT,
    )
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as s:
        s.sendall(b"no http at all\r\n\r\n")
        assert json.loads(s.makefile("rb").read().split(b"\r\n\r\n", 1)[1])["error"]["message"]


@pytest.mark.parametrize("path, body, headers, status, message", [
    ("/generate", b'\xef\xbb\xbf{"prompt": "a"}', {}, 400, "begins with a byte order mark"),
    ("/generate", '{"prompt": "a"}'.encode("utf-16"), {}, 400, "begins with a byte order mark"),
    ("/generate", gzip.compress(b'{"prompt": "a"}'), {"Content-Encoding": "gzip"}, 415,
     "the body is compressed (Content-Encoding: gzip)"),
    ("/v1/chat/completions", b'{"messages": []}', {}, 404, "use POST /v1/completions"),
], ids=["BOM", "UTF-16", "gzip", "chat"])
def test_a_body_that_other_servers_take_is_named(server, path, body, headers, status, message):
    """Guards against "not valid JSON" for a body that a client's library encoded otherwise."""
    headers = {"Content-Type": "application/json", **headers}
    response = requests.post(server.url + path, body, headers=headers, timeout=WAIT)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_the_openai_package_gets_what_it_expects(server, model):
    """Guards against leaving OpenAI's contract: its own package is the client."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [m.id for m in client.models.list()] == ["model_40000"]
    assert client.models.retrieve("model_40000").id == "model_40000"
    greedy = generate_text(model, "abc", max_length=16, temperature=0, top_k=None)[3:]
    answer = client.completions.create(model="model_40000", prompt="abc", temperature=0)
    assert answer.choices[0].text == greedy
    assert answer.choices[0].finish_reason == "length"
    assert (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    ) == (3, 16, 19)
    assert (
        client.completions.create(model="model_40000", prompt=list(b"abc"), temperature=0)
        .choices[0]
        .text
        == greedy
    )
    chunks = list(
        client.completions.create(
            model="model_40000",
            prompt="abc",
            temperature=0,
            stream=True,
            echo=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "abc" + greedy
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 16
    several = client.completions.create(
        model="model_40000",
        prompt=["ab", "abc"],
        n=2,
        max_tokens=9,
        seed=1,
        stop="\n\n",
        user="me",
        top_p=0.9,
        echo=True,
    )
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert [c.text[:3] for c in several.choices[2:]] == ["abc", "abc"]
    assert several.usage.prompt_tokens == 5
    assert several.choices[0].text != several.choices[1].text
    assert (
        client.completions.create(model="model_40000", prompt=[[1, 2], [3]]).usage.prompt_tokens
        == 3
    )
    for wrong, message in (
        (dict(temperature=3), "from 0 to 2: 0 is greedy"),
        (dict(best_of=4), "best_of is 4: it is not supported: leave it out, or give"),
        (dict(suffix="x"), 'suffix is "x": it is not supported: leave it out, or give null'),
        (dict(max_tokens=0), "max_tokens is 0: expected at least 1 without echo"),
        (dict(prompt=[300]), "token id out of range"),
        (dict(prompt=[]), "prompt is an empty list"),
        (dict(prompt=["a"] * 5, n=2), "prompt makes 10 sequences"),
        (dict(prompt=["a", "a" * 32769]), "at most 32768 characters"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)) as e:
            client.completions.create(**{**dict(model="model_40000", prompt="abc"), **wrong})
        assert e.value.param in wrong
    with pytest.raises(openai.NotFoundError) as e:
        client.completions.create(model="gpt-9", prompt="abc")
    assert e.value.code == "model_not_found"


def hostile_bodies(path, description):
    """Bodies near those that a route's description allows, and bytes that are no JSON at all."""
    ref = description["paths"][path]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]["$ref"]
    fields = description["components"]["schemas"][ref.rsplit("/", 1)[1]]["properties"]
    right = dict(
        prompt=st.text(max_size=80),
        max_length=st.just(2),
        max_tokens=st.just(2),
        temperature=st.floats(0, 2),
        top_k=st.integers(1, 300),
        top_p=st.floats(0.01, 1),
        seed=st.integers(0, 2**40),
        stream=st.booleans(),
        echo=st.booleans(),
        n=st.integers(1, 4),
        stop=st.lists(st.text(min_size=1, max_size=5), max_size=4),
    )
    always = {k: right[k] for k in ("prompt", "max_length", "max_tokens") if k in fields}
    good = st.fixed_dictionaries(
        always, optional={k: v for k, v in right.items() if k in fields and k not in always}
    )
    scalar = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(max_value=-1),
        st.integers(min_value=10**6),
        st.floats(),
        st.text(),
        st.sampled_from([10**400, 1e308, -0.0, "\x00", "\ud800", "NaN", "../../etc/passwd"]),
    )
    wrong = st.recursive(
        scalar,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=5,
    )
    bad = st.builds(
        lambda body, field, value: {**body, field: value},
        good,
        st.sampled_from([*fields, "unknown"]),
        wrong,
    )
    text = st.one_of(good, bad, bad, wrong).map(lambda body: json.dumps(body).encode())
    cut = st.builds(lambda t, n: t[: n % (len(t) + 1)], text, st.integers(0, 200))
    return st.one_of(
        text,
        text,
        text,
        text,
        cut,
        st.binary(max_size=60),
        st.sampled_from(
            [b"[" * 50000, b'{"prompt":' * 3000, b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}"]
        ),
    )


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_hostile_bodies_never_cause_a_500(server, path):
    """Guards against a body that breaks the server or kills the engine."""
    seen = {}

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile_bodies(path, server.get("/openapi.json").json()))
    def send(body):
        response = requests.post(
            server.url + path, data=body, headers={"Content-Type": "application/json"}, timeout=WAIT
        )
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (body, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"]
        assert "Traceback" not in response.text
        assert '"server_error"' not in response.text

    send()
    assert seen[200] >= 10, seen
    assert seen[400] >= 30, seen
    assert server.post(prompt="abc", max_length=5).json()["tokens_generated"] == 5
    assert server.metric("gpt2_sequences_total", finish_reason="error") == 0
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("schema", ["Generate", "Completion"])
def test_the_openapi_ranges_are_those_of_sampling(server, schema):
    """Guards against ranges that are told twice and differ, and a description without them."""
    description = server.get("/openapi.json").json()["components"]["schemas"][schema]
    declared = {field.name: field.metadata for field in dataclasses.fields(SamplingParams)}
    for name, schema_key, limit in (
        ("temperature", "minimum", "low"),
        ("temperature", "maximum", "high"),
        ("top_p", "exclusiveMinimum", "above"),
        ("top_p", "maximum", "high"),
        ("top_k", "minimum", "low"),
        ("seed", "minimum", "low"),
    ):
        field = description["properties"][name]
        kinds = field.get("anyOf", [field])  # anyOf: a number or null
        assert kinds[0][schema_key] == declared[name][limit], name
