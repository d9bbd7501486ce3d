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

import dataclasses
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from itertools import chain
from pathlib import Path

from gptlib.api import VERSION, ApiError, openapi, parse_body, request_models
from gptlib.common import ArgumentParser, UserError, run_main
from gptlib.config import add_flags, check_settings, read_environment, setting
from gptlib.service import Service, say
from inference import DEFAULT_CHECKPOINT, load_model_from_checkpoint

# -----------------------------------------------------------------------------
# settings: one dataclass makes the environment variables, the flags, their checks and the README's table


@dataclasses.dataclass
class Settings:
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every one this machine has")
    port: int = setting(5000, "0 takes a free one", 0, 65535)
    model_checkpoint: str = setting(DEFAULT_CHECKPOINT, "a file, a Hugging Face directory or a GPT-2 name")
    model_name: str = setting("", "what clients call the model (default: the checkpoint's name)")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(False, "torch.compile the decode step: a slower start, then faster")
    api_key: str = setting("", "what clients have to show, but for /health and the page (default: nothing)")
    rate_limit: str = setting("", 'requests for text from one address, as "60 per minute" or "5/second" (default: any)')
    max_length_limit: int = setting(1024, "new tokens a sequence at most", 1)
    max_prompt_length: int = setting(32768, "characters, or token ids, of a prompt at most", 1)
    max_body_size: int = setting(1048576, "bytes of a request's body at most", 1)
    slots: int = setting(8, "sequences that are continued at a time", 1, 1024)
    queue_size: int = setting(64, "sequences that may wait for a slot; more are refused with 429", 0, 10000)
    request_timeout: float = setting(300.0, "seconds until a request that is not done gets 504", 0.01)

    def __post_init__(self):
        check_settings(self, str.upper)


def read_settings(argv=(), env=None):
    """Settings from the environment and, over them, from flags. Raises UserError for what can't be one."""
    parser = ArgumentParser(__doc__)
    add_flags(parser, Settings)
    flags = vars(parser.parse_args(list(argv)))
    return Settings(**{**read_environment(Settings, os.environ if env is None else env), **flags})


PAGE = Path(__file__).resolve().parent / "gptlib" / "page"


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
# the app


def create_app(settings=None):
    """The Flask app. Its service, app.extensions["service"], has yet to be started."""
    from flask import Flask, Response, jsonify, request, send_from_directory
    from flask_limiter import Limiter
    from flask_limiter.util import get_remote_address
    from limits import parse_many
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from werkzeug.exceptions import HTTPException

    settings = settings or read_settings()
    service = Service(settings, load_model_from_checkpoint)
    Generate, Completion = models = request_models(settings)
    app = Flask(__name__, static_folder=None)
    app.extensions["service"] = service
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_size
    app.json.sort_keys = False

    @app.before_request
    def check_key():
        request.environ["serve.start"] = time.monotonic()
        if settings.api_key and request.endpoint not in ("page", "page_style", "page_script", "health"):
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

    def page_file(name):
        response = send_from_directory(PAGE, name)
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; connect-src 'self'; style-src 'self'; script-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        return response

    @app.get("/")
    def page():
        return page_file("index.html")

    @app.get("/page.css")
    def page_style():
        return page_file("page.css")

    @app.get("/page.js")
    def page_script():
        return page_file("page.js")

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


if __name__ == "__main__":
    run_main(main)
