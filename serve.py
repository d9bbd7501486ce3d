"""
HTTP over the engine of inference.py: many clients share one model, each gets its text as it is written.

The newest checkpoint of the last run on http://127.0.0.1:5000 (open it in a browser: a page to try the model), or another:
$ python serve.py
$ PORT=8080 MODEL_CHECKPOINT=log/model_40000.pt python serve.py
$ curl -X POST http://localhost:5000/generate -H "Content-Type: application/json" \\
    -d '{"prompt": "The future of AI is", "max_length": 100, "temperature": 0.8, "top_k": 50}'
As it is written, in server-sent events (-N: curl must not hold them back):
$ curl -N http://localhost:5000/generate -H "Content-Type: application/json" -d '{"prompt": "Once", "stream": true}'
OpenAI's clients find what they expect under http://localhost:5000/v1 (completions and models).

For others than this machine: HOST=0.0.0.0, an API_KEY, a RATE_LIMIT such as "60 per minute".
Every setting is an environment variable and a flag (PORT=8080 or --port 8080; the flag counts). Under gunicorn, variables
only, one worker (a second would have a model and a queue of its own) and a thread for each request in flight:
$ gunicorn serve:app --worker-class gthread --workers 1 --threads 80 --timeout 0 --graceful-timeout 300 --bind 127.0.0.1:5000

Ctrl-C or SIGTERM: new requests get 503, those in flight are finished, exit code 0. A second one exits at once.
"""

import atexit
import dataclasses
import hmac
import json
import math
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch

from fineweb import ArgumentParser, UserError, run_main
from inference import DEFAULT_CHECKPOINT, Engine, TextStream, load_model_from_checkpoint
from train_gpt2 import flag

VERSION = "1.0.0"

# -----------------------------------------------------------------------------
# settings: one dataclass makes the environment variables, the flags, their checks and the README's table


@dataclasses.dataclass
class Settings:
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 is every one this machine has")
    port: int = flag(5000, "0 takes a free one", 0, 65535)
    model_checkpoint: str = flag(DEFAULT_CHECKPOINT, "a file, a Hugging Face directory or a GPT-2 name")
    model_name: str = flag("", "what clients call the model (default: the checkpoint's name)")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = flag(False, "torch.compile the decode step: a slower start, then faster")
    api_key: str = flag("", "what clients have to show, but for /health and the page (default: nothing)")
    rate_limit: str = flag("", 'requests for text from one address, as "60 per minute" or "5/second" (default: any)')
    max_length_limit: int = flag(1024, "new tokens a sequence at most", 1)
    max_prompt_length: int = flag(32768, "characters, or token ids, of a prompt at most", 1)
    max_body_size: int = flag(1048576, "bytes of a request's body at most", 1)
    slots: int = flag(8, "sequences that are continued at a time", 1, 1024)
    queue_size: int = flag(64, "sequences that may wait for a slot; more are refused with 429", 0, 10000)
    request_timeout: float = flag(300.0, "seconds until a request that is not done gets 504", 0.01)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, high, choices = getattr(self, f.name), *(f.metadata[k] for k in ("low", "high", "choices"))
            if low is not None and not low <= value <= (math.inf if high is None else high):
                raise UserError(f"{f.name.upper()} is {value}: expected "
                                + (f"at least {low}" if high is None else f"{low} to {high}"))
            if choices and value not in choices:
                raise UserError(f"{f.name.upper()} is {value!r}: choose one of {', '.join(choices)}")


def read_settings(argv=(), env=None):
    """Settings from the environment and, over them, from flags. Raises UserError for what can't be one."""
    def convert(f, text):
        try:
            return dict(true=True, false=False)[{"1": "true", "0": "false"}.get(text.lower(), text.lower())] \
                if f.type is bool else f.type(text)
        except (KeyError, ValueError):
            kind = {int: "a whole number", float: "a number", bool: "true or false"}[f.type]
            raise UserError(f"{f.name.upper()} is {text!r}: expected {kind}") from None

    env = os.environ if env is None else env
    parser = ArgumentParser(__doc__)
    for f in dataclasses.fields(Settings):
        default = "" if f.default == "" else f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", metavar=f.name.upper(), default=env.get(f.name.upper()) or None,
                            help=(f.metadata["help"] + default).replace("%", "%%"))
    given = vars(parser.parse_args(list(argv)))
    return Settings(**{f.name: convert(f, given[f.name]) for f in dataclasses.fields(Settings) if given[f.name] is not None})


# -----------------------------------------------------------------------------
# the service: one thread has the model, those of the requests wait


def say(text):
    print(text, file=sys.stderr, flush=True)


class ApiError(Exception):
    """What a client is told in the place of an answer."""

    def __init__(self, status, message, field=None, code=None, retry_after=None):
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry_after = status, message, field, code, retry_after

    def body(self):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return dict(error=dict(message=self.message, type=kind, param=self.field, code=self.code))


class Metrics:
    """What /metrics tells."""

    def __init__(self, service):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
        disable_created_metrics()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.requests = Counter("gpt2_http_requests_total", "HTTP requests answered", ["route", "code"], registry=r)
        self.latency = Histogram("gpt2_http_request_duration_seconds", "From a request to the end of its answer", ["route"],
                                 registry=r, buckets=seconds)
        self.first_token = Histogram("gpt2_time_to_first_token_seconds", "From a request to its first token", registry=r,
                                     buckets=seconds)
        self.sequences = Counter("gpt2_sequences_total", "Sequences that have ended, by how", ["finish_reason"], registry=r)
        self.prompt_tokens = Counter("gpt2_prompt_tokens_total", "Tokens of prompts, once a sequence", registry=r)
        self.tokens = Counter("gpt2_generated_tokens_total", "Tokens generated", registry=r)
        for name, help, value in (
                ("gpt2_slots", "Sequences that can be continued at a time", lambda: service.settings.slots),
                ("gpt2_slots_in_use", "Sequences that are being continued", lambda: service.load()[0]),
                ("gpt2_queue_sequences", "Sequences that wait for a slot", lambda: service.load()[1])):
            Gauge(name, help, registry=r).set_function(value)


class Job:
    """What one HTTP request wants: sequences that are admitted, timed and let go together."""

    def __init__(self, service, requests, stop, gone):
        self.service, self.requests, self.gone = service, requests, gone
        self.streams = [TextStream(r, service.tokenizer, stop) for r in requests]
        self.start, self.waits = time.monotonic(), True  # for its first token

    def pieces(self):
        """(index, text) of its sequences, a piece of each in turn as they come, and (index, None) where one has ended."""
        going = dict(enumerate(map(iter, self.streams)))
        while going:
            for i in list(going):
                piece = next(going[i], None)
                if piece is None:
                    del going[i]
                    self.check(self.requests[i])
                yield i, piece

    def check(self, request):
        """Raise what an end means that is not one of the text."""
        if request.finish_reason == "cancelled":
            raise ApiError(499, "the client has gone")  # for the metrics: nobody reads it
        if request.finish_reason == "timeout":
            raise ApiError(504, f"not done within {self.service.settings.request_timeout:g} seconds (REQUEST_TIMEOUT)")
        if request.finish_reason not in ("stop", "length"):
            raise ApiError(500, "the model failed on this request; the server's log says why")

    def note_first_token(self):
        if self.waits and any(r.tokens for r in self.requests):
            self.waits = False
            self.service.metrics.first_token.observe(time.monotonic() - self.start)

    def close(self):
        """Give back what it holds; to be called at its end, whatever that is, and as often as one likes."""
        with self.service.lock:
            if self not in self.service.jobs:
                return
            self.service.jobs.remove(self)
        self.note_first_token()  # where it has ended before the engine looked again
        for request in self.requests:
            request.cancel()
            if request.error:
                traceback.print_exception(request.error)
            self.service.metrics.sequences.labels(request.finish_reason).inc()
            self.service.metrics.tokens.inc(len(request.tokens))
        self.service.wake.set()


class Service:
    """The model, the thread that owns it, and the jobs it has. status: loading, failed, healthy, draining or closed."""

    def __init__(self, settings):
        self.settings, self.status, self.error = settings, "loading", None
        self.model = self.tokenizer = self.engine = None
        self.jobs, self.lock = set(), threading.Lock()
        self.wake = threading.Event()  # there is something to do for the engine's thread
        self.over = threading.Event()  # there is something to do for main()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.created = int(time.time())
        self.metrics = Metrics(self)

    def start(self):
        self.thread.start()
        atexit.register(self.close)  # a thread inside torch must not be there when the interpreter goes
        return self

    def close(self):
        self.status = "closed"
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(timeout=10)

    def _run(self):
        try:
            self._load()
        except Exception as error:
            self.status, self.error = "failed", error
            say(f"error: {error}")
            self.over.set()
            return
        with self.lock:
            ready = self.status == "loading"
            self.status = "healthy" if ready else self.status
        if ready:
            say("serving {model}: {parameters:,} parameters, {device}, {dtype}".format(**self.about))
        while self.status != "closed":
            self.wake.clear()
            try:
                self._look_after()
                busy = self.engine.step()
            except Exception as error:  # nobody's in particular: those in slots are lost, those that wait are not
                traceback.print_exception(error)
                self.engine.abort(error)
                busy = True
            if not busy:
                self.wake.wait()

    def _load(self):
        settings = self.settings
        model = load_model_from_checkpoint(settings.model_checkpoint, settings.device, settings.dtype)
        parameters = sum(p.numel() for p in model.parameters())
        if parameters < 10**7:
            torch.set_num_threads(1)  # a step of a small model is over before a second thread has woken
        tokenizer = model.tokenizer
        engine = Engine(model, settings.slots, tokenizer.n_vocab, tokenizer.eot_token, settings.compile, say)
        engine.warm_up()
        name = Path(settings.model_checkpoint).resolve().stem  # latest_checkpoint.pt is a link to the one it is
        self.name = settings.model_name or name
        weight = model.lm_head.weight
        self.about = dict(model=self.name, step=model.step, parameters=parameters, context=model.config.block_size,
                          device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."),
                          sample_prompt=model.sample_prompt)
        self.model, self.tokenizer, self.engine = model, tokenizer, engine

    def _look_after(self):
        """Between two tokens: note who has got the first, let go of those that nobody waits for."""
        now = time.monotonic()
        for job in list(self.jobs):
            job.note_first_token()
            late = now - job.start > self.settings.request_timeout
            if late or job.gone():
                for request in job.requests:
                    request.cancel("timeout" if late else "cancelled")

    def load(self):
        """How many sequences have a slot, and how many wait."""
        return (len(self.engine.live), len(self.engine.waiting)) if self.engine else (0, 0)

    def check_open(self):
        if self.status == "loading":
            raise ApiError(503, "the model is still being loaded, try again in a moment", retry_after=2)
        if self.status != "healthy":
            raise ApiError(503, f"this server takes no more requests, it is {self.status}", retry_after=10)

    def submit(self, prompts, field, stop, gone, seed, **how):
        """Queue prompts, lists of token ids; the Job. Raises ApiError 400, 429 and 503."""
        room = self.settings.slots + self.settings.queue_size
        if len(prompts) > room:
            raise ApiError(400, f"{field} makes {len(prompts)} sequences: at most {room} are taken at once", field)
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        with self.lock:
            self.check_open()
            if sum(len(job.requests) for job in self.jobs) + len(prompts) > room:
                raise ApiError(429, "all slots are taken and the queue is full, try again in a moment", code="queue_full",
                               retry_after=1)
            requests = [self.engine.submit(prompt, seed=seed + i, **how) for i, prompt in enumerate(prompts)]
            job = Job(self, requests, stop, gone)
            self.jobs.add(job)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        self.wake.set()
        return job

    def drain(self):
        """Refuse what is new and wait for what is there."""
        with self.lock:
            self.status = "draining"
        while self.jobs:
            time.sleep(0.02)


def client_gone(environ):
    """A function that tells whether the client of a WSGI request has hung up, as far as the server lets one see."""
    def closed():
        try:
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, ValueError):  # nothing to read; TLS doesn't let one peek
            return False
        except OSError:
            return True

    connection = environ.get("gunicorn.socket")
    return environ.get("waitress.client_disconnected") or (closed if connection else lambda: False)


# -----------------------------------------------------------------------------
# what requests look like


def request_models(settings):
    """The bodies of /generate and /v1/completions as pydantic models; a field's description says what is expected."""
    from pydantic import BaseModel, ConfigDict, Field
    limit, room, chars = settings.max_length_limit, settings.slots + settings.queue_size, settings.max_prompt_length

    def whole(default, low, high, note=""):
        return Field(default, ge=low, le=high, description=f"a whole number from {low} to {high}{note}")

    def temperature_from(default):
        return Field(default, ge=0, le=2, description="a number from 0 (greedy) to 2")

    def top_k_from(default):
        return whole(default, 1, 10**6, ": draw from the k likeliest tokens; null: from all")

    def unsupported(value):
        return Field(None, description=f"not offered here: leave it out, or give {value}")

    StopText = Annotated[str, Field(min_length=1, max_length=200)]

    class Body(BaseModel):
        model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    class Sampling(Body):
        top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and up to 1: draw from the likeliest "
                                    "tokens of this mass; null: from all")
        seed: int | None = whole(None, 0, 2**63 - 1, "; the next sample has the next")
        stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = Field(
            None, description="a text of 1 to 200 characters, or up to 4 of them, that ends the continuation")
        stream: bool | None = Field(False, description="true or false; true sends server-sent events")

    class Generate(Sampling):
        prompt: str = Field(max_length=chars, description=f"a text of at most {chars} characters")
        max_length: int = whole(min(100, limit), 1, limit, ", the most tokens to add")
        temperature: float = temperature_from(0.8)
        top_k: int | None = top_k_from(50)
        num_samples: int = whole(1, 1, room)

    class StreamOptions(Body):
        include_usage: bool | None = None

    class Completion(Sampling):
        model: str | None = Field(None, max_length=500, description="the name that /v1/models tells")
        prompt: str | list[str] | list[int] | list[list[int]] = Field(
            max_length=chars, description=f"a text of at most {chars} characters, as many token ids, or a list of such")
        max_tokens: int | None = whole(min(16, limit), 1, limit, ", the most tokens to add")
        temperature: float | None = temperature_from(1.0)
        top_k: int | None = top_k_from(None)
        n: int | None = whole(1, 1, room)
        stream_options: StreamOptions | None = Field(None, description='{"include_usage": true} or null')
        echo: bool | None = Field(False, description="true or false; true begins with the prompt")
        user: str | None = Field(None, max_length=500, description="a text of at most 500 characters, not looked at")
        best_of: Literal[1] | None = unsupported(1)
        logprobs: None = unsupported("null")
        suffix: None = unsupported("null")
        logit_bias: None = unsupported("null")
        presence_penalty: Literal[0] | None = unsupported(0)
        frequency_penalty: Literal[0] | None = unsupported(0)

    return Generate, Completion


def parse_body(model, data):
    """The body of a request as the pydantic model. Raises ApiError 400 that names the field and what is expected there."""
    from pydantic import ValidationError
    try:
        return model.model_validate_json(data)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
    field = ".".join(map(str, error["loc"][:1]))
    if not field:
        wrong = "is not valid JSON" if error["type"] == "json_invalid" else "is not a JSON object"
        raise ApiError(400, f"the body {wrong}: {error['msg'].removeprefix('Invalid JSON: ')}")
    if field not in model.model_fields:
        raise ApiError(400, f"unknown field {field[:50]!r}: expected {', '.join(model.model_fields)}", field[:50])
    found = "missing" if error["type"] == "missing" else json.dumps(error["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    raise ApiError(400, f"{field} is {found}: expected {model.model_fields[field].description}", field)


def openapi(models):
    """The OpenAPI description: the bodies in full, the other routes by name."""
    from pydantic.json_schema import models_json_schema
    _, schemas = models_json_schema([(m, "validation") for m in models], ref_template="#/components/schemas/{model}")
    answers = {str(code): dict(description=text) for code, text in {
        200: "JSON, or server-sent events where stream is true", 400: "malformed or out of range", 401: "API key",
        404: "no such model", 413: "body too large", 415: "not JSON", 429: "queue full, or rate limit: see Retry-After",
        500: "failed", 503: "loading or draining", 504: "not done in time"}.items()}

    def post(summary, model):
        body = {"application/json": dict(schema={"$ref": f"#/components/schemas/{model.__name__}"})}
        return dict(post=dict(summary=summary, requestBody=dict(required=True, content=body), responses=answers))

    def get(summary):
        return dict(get=dict(summary=summary, responses={"200": dict(description=summary)}))

    generate, completion = models
    return dict(openapi="3.1.0", info=dict(title="GPT-2", version=VERSION), security=[{}, dict(key=[])], paths={
        "/generate": post("Continue a text", generate), "/v1/completions": post("OpenAI's completions", completion),
        "/v1/models": get("The model"), "/health": get("State of the server"), "/metrics": get("Prometheus")},
        components=dict(schemas=schemas["$defs"], securitySchemes=dict(key=dict(type="http", scheme="bearer"))))


# -----------------------------------------------------------------------------
# the app


def create_app(settings=None):
    """The Flask app. Its service, app.extensions["service"], has yet to be started."""
    from flask import Flask, Response, jsonify, request
    from flask_limiter import Limiter
    from flask_limiter.util import get_remote_address
    from limits import parse_many
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from werkzeug.exceptions import HTTPException

    settings = settings or read_settings()
    service = Service(settings)
    Generate, Completion = models = request_models(settings)
    app = Flask(__name__, static_folder=None)
    app.extensions["service"] = service
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_size
    app.json.sort_keys = False

    @app.before_request
    def check_key():
        request.environ["serve.start"] = time.monotonic()
        if settings.api_key and request.endpoint not in ("page", "health"):
            shown = request.headers.get("X-API-Key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(shown.encode("latin-1", "replace"), settings.api_key.encode()):
                raise ApiError(401, "the API key is missing or wrong: expected Authorization: Bearer KEY, or X-API-Key: KEY",
                               code="invalid_api_key")

    # after the check of the key: who has none uses up nobody's rate
    try:
        parse_many(settings.rate_limit or "1/second")
    except ValueError as e:
        raise UserError(f'RATE_LIMIT is {settings.rate_limit!r}: expected the like of "60 per minute" or "5/second"') from e
    limiter = Limiter(get_remote_address, app=app, storage_uri="memory://", strategy="moving-window")
    limited = limiter.shared_limit(settings.rate_limit, "text") if settings.rate_limit else lambda view: view

    @app.after_request
    def count(response):
        route = request.url_rule.rule if request.url_rule else "other"  # no labels made up by clients
        start = request.environ.get("serve.start", time.monotonic())
        service.metrics.requests.labels(route, response.status_code).inc()
        response.call_on_close(lambda: service.metrics.latency.labels(route).observe(time.monotonic() - start))
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    def tell(error):
        response = jsonify(error.body())
        response.status_code = error.status
        if error.retry_after:
            response.headers["Retry-After"] = str(error.retry_after)
        return response

    @app.errorhandler(Exception)
    def failed(error):
        if isinstance(error, ApiError):
            return tell(error)
        if isinstance(error, UserError):
            return tell(ApiError(400, str(error)))
        if not isinstance(error, HTTPException):
            traceback.print_exception(error)
            return tell(ApiError(500, "this server has failed on the request; its log says why"))
        message, wait = f"{error.name}: {request.method} {request.path[:100]}", None
        if error.code == 413:
            message = f"the body is too large: expected at most {settings.max_body_size} bytes (MAX_BODY_SIZE)"
        elif error.code == 429:
            wait = max(1, int(limiter.current_limit.reset_at - time.time()))
            message = f"more than {error.description}, the rate limit; try again in {wait} seconds"
        response = tell(ApiError(error.code, message, retry_after=wait))
        if error.code == 405:
            response.headers["Allow"] = ", ".join(error.valid_methods)
        return response

    def read(model):
        service.check_open()
        if request.mimetype != "application/json":
            raise ApiError(415, f"the content type is {request.mimetype[:50]!r}: expected application/json")
        return parse_body(model, request.get_data(cache=False))

    def submit(body, prompts, field, n, max_length):
        """Queue n sequences a prompt; the Job."""
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return service.submit([prompt for prompt in prompts for _ in range(n)], field, stop, client_gone(request.environ),
                              body.seed, max_length=max_length, top_k=body.top_k, top_p=body.top_p,
                              temperature=1.0 if body.temperature is None else body.temperature)

    def answer(job, stream, events, whole):
        """The events as they come; or, where it is not to be a stream, what whole() makes of the job when it is done."""
        def sent():
            try:
                for event in chain(first, events):
                    yield f"data: {json.dumps(event)}\n\n"
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield f"data: {json.dumps(error.body())}\n\n"

        try:
            first = [next(events)] if stream else list(events)  # what fails before the first event is still an HTTP error
        except BaseException:
            job.close()
            raise
        if not stream:
            job.close()
            return jsonify(whole())
        response = Response(sent(), mimetype="text/event-stream",
                            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        response.call_on_close(job.close)  # however it ends: at its end, or where the client has gone
        return response

    @app.post("/generate")
    @limited
    def generate():
        body = read(Generate)
        prompt = service.tokenizer.encode_ordinary(body.prompt) or [service.tokenizer.eot_token]
        job = submit(body, [prompt], "num_samples", body.num_samples, body.max_length)

        def sample(i):
            return dict(generated_text=body.prompt + job.streams[i].text, tokens_generated=job.streams[i].n_tokens,
                        finish_reason=job.requests[i].finish_reason, seed=job.requests[i].seed)

        def events():
            for i, piece in job.pieces():
                yield dict(index=i, text=piece) if piece is not None else dict(index=i, text="", **sample(i))

        def whole():
            samples = [sample(i) for i in range(body.num_samples)]
            more = dict(samples=samples) if body.num_samples > 1 else {}
            return dict(prompt=body.prompt, **samples[0], model=service.name, prompt_tokens=len(prompt), **more)

        return answer(job, body.stream, events(), whole)

    @app.post("/v1/completions")
    @limited
    def completions():
        body = read(Completion)
        if body.model not in (None, service.name):
            raise ApiError(404, f"no model {body.model!r} here: expected {service.name!r}", "model", "model_not_found")
        tokenizer, n = service.tokenizer, body.n or 1
        several = isinstance(body.prompt, list) and not (body.prompt and isinstance(body.prompt[0], int))
        prompts = [tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token] if isinstance(prompt, str) else prompt
                   for prompt in (body.prompt if several else [body.prompt])]
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt is an empty list: expected a text, token ids, or a list of such", "prompt")
        if several and any(len(prompt) > settings.max_prompt_length for prompt in body.prompt):
            raise ApiError(400, f"prompt has one that is too long: expected {Completion.model_fields['prompt'].description}",
                           "prompt")
        if not all(0 <= token < tokenizer.n_vocab for prompt in prompts for token in prompt):
            raise ApiError(400, f"prompt has a token id out of range: expected 0 to {tokenizer.n_vocab - 1}", "prompt")
        job = submit(body, prompts, "prompt", n, body.max_tokens or min(16, settings.max_length_limit))
        head = dict(id=f"cmpl-{uuid.uuid4().hex}", object="text_completion", created=int(time.time()), model=service.name)
        echo = [tokenizer.decode(prompt) if body.echo else "" for prompt in prompts for _ in range(n)]
        more = dict(usage=None) if body.stream_options and body.stream_options.include_usage else {}

        def choice(i, text, finish_reason=None):
            return dict(index=i, text=text, logprobs=None, finish_reason=finish_reason)

        def usage():
            read, new = sum(map(len, prompts)), sum(stream.n_tokens for stream in job.streams)
            return dict(prompt_tokens=read, completion_tokens=new, total_tokens=read + new)

        def events():
            for i, text in enumerate(echo):
                if text:
                    yield dict(**head, choices=[choice(i, text)], **more)
            for i, piece in job.pieces():
                ended = job.requests[i].finish_reason if piece is None else None
                yield dict(**head, choices=[choice(i, piece or "", ended)], **more)
            if more:
                yield dict(**head, choices=[], usage=usage())

        def whole():
            return dict(**head, usage=usage(), choices=[choice(i, echo[i] + stream.text, stream.request.finish_reason)
                                                        for i, stream in enumerate(job.streams)])

        return answer(job, body.stream, events(), whole)

    @app.get("/v1/models", defaults={"name": None})
    @app.get("/v1/models/<path:name>")
    def list_models(name):
        if not service.model:
            service.check_open()
        if name not in (None, service.name):
            raise ApiError(404, f"no model {name[:100]!r} here: expected {service.name!r}", "model", "model_not_found")
        card = dict(id=service.name, object="model", created=service.created, owned_by="local")
        return jsonify(card if name else dict(object="list", data=[card]))

    @app.get("/health")
    def health():
        busy, waiting = service.load()
        about = service.about if service.model else {}
        return jsonify(dict(status=service.status, **about, slots=settings.slots, slots_in_use=busy, queue=waiting,
                            max_length_limit=settings.max_length_limit, key_required=bool(settings.api_key),
                            version=VERSION)), 200 if service.status == "healthy" else 503

    @app.get("/metrics")
    def metrics():
        return Response(generate_latest(service.metrics.registry), content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    def description():
        return jsonify(openapi(models))

    @app.get("/")
    def page():
        return Response(PAGE, mimetype="text/html", headers={"Content-Security-Policy": (
            "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")})

    return app


def __getattr__(name):
    """`gunicorn serve:app` asks for it: made and started then, not when the module is imported."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = app = create_app()
    app.extensions["service"].start()
    return app


def create_server(app, settings):
    """waitress around the app, listening; its own errors (a body too large, bytes that are no HTTP) are JSON as well."""
    import waitress
    from waitress.channel import HTTPChannel
    from waitress.task import ErrorTask

    class JsonErrorTask(ErrorTask):
        def execute(self):
            error = self.request.error
            body = json.dumps(ApiError(error.code, f"{error.reason}: {error.body}").body()).encode()
            self.status, self.content_length = f"{error.code} {error.reason}", len(body)
            self.response_headers.append(("Content-Type", "application/json"))
            self.set_close_on_finish()
            self.write(body)

    class Channel(HTTPChannel):
        error_task_class = JsonErrorTask

    try:
        listener = socket.create_server((settings.host, settings.port), backlog=1024,
                                        family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    except OSError as e:
        raise UserError(f"cannot listen on {settings.host} port {settings.port} ({e.strerror}): choose others with HOST and "
                        "PORT") from e
    # a thread for each sequence that is admitted, and some that can always say no; the lookahead sees who hangs up
    server = waitress.create_server(
        app, sockets=[listener], threads=settings.slots + settings.queue_size + 8, channel_request_lookahead=1,
        max_request_body_size=settings.max_body_size + 1, asyncore_use_poll=True, connection_limit=1000,
        log_socket_errors=False, ident="")
    server.channel_class = Channel
    return server


def main():
    settings = read_settings(sys.argv[1:])
    app = create_app(settings)
    service = app.extensions["service"]
    server = create_server(app, settings)

    def stop(*_):
        if service.over.is_set():
            os._exit(1)
        service.over.set()

    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, stop)
    threading.Thread(target=server.run, name="http", daemon=True).start()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"listening on http://{host}:{server.effective_port}, loading {settings.model_checkpoint}")
    service.start()
    service.over.wait()
    if service.error:
        sys.exit(1)
    say("finishing what is in flight")
    service.drain()
    limit = time.monotonic() + 5  # for what is written but not yet sent
    while time.monotonic() < limit and any(c.requests or c.total_outbufs_len for c in list(server.active_channels.values())):
        time.sleep(0.02)
    server.task_dispatcher.shutdown()


# -----------------------------------------------------------------------------
# the page

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>GPT-2</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --bg: #fbfaf8; --fg: #1d1c1a; --dim: #6d6962; --line: #dcd8d0; --box: #fff; --go: #1f5fbf }
@media (prefers-color-scheme: dark) {
  :root { --bg: #16171a; --fg: #e9e7e3; --dim: #a09c95; --line: #34363b; --box: #1e2024; --go: #8ab4f8 } }
* { box-sizing: border-box } body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui }
main { max-width: 46rem; margin: 0 auto; padding: 1.2rem 1rem 3rem } h1 { font-size: 1.3rem; margin: 0 }
#about, #status { color: var(--dim); font-size: .85rem; margin: 0 0 1rem; min-height: 1.3em; overflow-wrap: anywhere }
textarea, input[type=number], input[type=password], #text { width: 100%; padding: .6rem .7rem; font: inherit; color: inherit;
  background: var(--box); border: 1px solid var(--line); border-radius: 8px } textarea { min-height: 6rem; resize: vertical }
.knobs { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem 1.2rem; margin: .9rem 0 }
[hidden] { display: none !important }
label { font-size: .85rem; color: var(--dim); display: block } output { float: right; color: var(--fg) }
input[type=range] { width: 100%; accent-color: var(--go) } button { font: inherit; padding: .5rem 1.3rem; border-radius: 8px;
  border: 1px solid var(--go); background: var(--go); color: var(--bg); cursor: pointer; margin: 0 .5rem .8rem 0 }
#stop { background: none; color: var(--go) } button:disabled { opacity: .4; cursor: default }
#text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 9rem }
#text span { color: var(--dim) } .bad { color: #c62828 !important } :focus-visible { outline: 2px solid var(--go) }
</style></head><body><main>
<h1>GPT-2</h1><p id="about">looking for the model ...</p>
<label for="prompt">Prompt</label><textarea id="prompt"></textarea>
<div class="knobs">
<label>New tokens<output></output><input id="max_length" type="range" min="1" max="1024" value="100"></label>
<label>Temperature<output></output><input id="temperature" type="range" min="0" max="2" step="0.05" value="0.8"></label>
<label>Top k (0: off)<output></output><input id="top_k" type="range" min="0" max="200" value="50"></label>
<label>Top p<output></output><input id="top_p" type="range" min="0.05" max="1" step="0.05" value="1"></label>
<label>Seed<input id="seed" type="number" min="0" placeholder="a new one"></label>
<label id="keybox" hidden>API key<input id="key" type="password" autocomplete="off"></label></div>
<button id="go">Generate</button><button id="stop" disabled>Stop</button>
<p id="status" role="status"></p><div id="text" aria-label="Generated text"></div>
</main><script>
"use strict";
const $ = id => document.getElementById(id), tell = (text, bad) => {
  $("status").textContent = text; $("status").classList.toggle("bad", !!bad) };
for (const knob of document.querySelectorAll("input[type=range]"))
  (knob.oninput = () => knob.previousElementSibling.textContent = knob.value)();

async function look() {  // what is loaded, and what it needs
  const health = await (await fetch("health")).json().catch(() => ({status: "out of reach"}));
  $("keybox").hidden = !health.key_required;
  if (!health.model) { $("about").textContent = "the model is " + health.status; return setTimeout(look, 1000); }
  if (!$("prompt").value) $("prompt").value = health.sample_prompt;
  const at = health.step === null ? "" : ` at step ${health.step.toLocaleString("en")}`;
  $("about").textContent = `${health.model}${at}, ${(health.parameters / 1e6).toPrecision(3)}M parameters, context of `
    + `${health.context} tokens, on ${health.device} in ${health.dtype}`;
  $("max_length").max = health.max_length_limit; $("max_length").oninput();
}
look().catch(() => { $("about").textContent = "the server is out of reach" });

let running = null;
async function generate() {
  running = new AbortController();
  $("go").disabled = true; $("stop").disabled = false;
  const body = {prompt: $("prompt").value, max_length: +$("max_length").value, temperature: +$("temperature").value,
    top_k: +$("top_k").value || null, top_p: +$("top_p").value, stream: true};
  if ($("seed").value) body.seed = +$("seed").value;
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers["X-API-Key"] = $("key").value;
  const said = document.createElement("span"), start = performance.now();
  said.textContent = body.prompt; $("text").replaceChildren(said, ""); tell("...");
  try {
    const response = await fetch("generate", {method: "POST", headers, body: JSON.stringify(body), signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let held = "", part; !(part = await reader.read()).done;) {
      const events = (held + part.value).split("\\n\\n");
      held = events.pop();
      for (const event of events.filter(e => e !== "data: [DONE]").map(e => JSON.parse(e.slice(6)))) {
        if (event.error) throw new Error(event.error.message);
        $("text").lastChild.data += event.text;
        const n = event.tokens_generated, seconds = (performance.now() - start) / 1000;
        if (n !== undefined) tell(`${n} tokens in ${seconds.toFixed(1)} s, ${(n / seconds).toFixed(0)} tokens/s; seed `
          + `${event.seed}, ${event.finish_reason}`);
      }
    }
  } catch (error) { error.name === "AbortError" ? tell("stopped") : tell(error.message, true); }
  $("go").disabled = false; $("stop").disabled = true;
}
$("go").onclick = generate;
$("stop").onclick = () => running.abort();
$("prompt").onkeydown = e => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && !$("go").disabled) generate() };
</script></body></html>
"""

if __name__ == "__main__":
    run_main(main)
