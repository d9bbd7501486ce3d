"""
HTTP over the engine: many clients share one model, and each gets its text as it is generated.

The newest checkpoint of the last run on http://127.0.0.1:5000, or another one (open the address in
a browser for a page to try the model):
$ python serve.py
$ PORT=8080 MODEL_CHECKPOINT=log/model_40000.pt python serve.py
$ curl -X POST http://localhost:5000/generate -H "Content-Type: application/json" \\
    -d '{"prompt": "The future of AI is", "max_length": 100, "temperature": 0.8, "top_k": 50}'
Streamed as server-sent events (-N keeps curl from buffering them):
$ curl -N http://localhost:5000/generate -H "Content-Type: application/json" \\
    -d '{"prompt": "Once", "stream": true}'
OpenAI's clients find completions and models under http://localhost:5000/v1.

To serve other machines: HOST=0.0.0.0, an API_KEY, and a RATE_LIMIT such as "60 per minute".
Every setting is an environment variable and a flag (PORT=8080 or --port 8080; the flag wins). Under
gunicorn, variables only, one worker (a second one would have its own model and queue), and a thread
for each request in flight:
$ gunicorn serve:app --worker-class gthread --workers 1 --threads 80 --timeout 0 \\
    --graceful-timeout 300 --bind 127.0.0.1:5000

Ctrl-C or SIGTERM: new requests get 503, those in flight are finished, exit code 0. A second signal
exits at once.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from gptlib.common import ArgumentParser, UserError, log, run_main, warn
from gptlib.config import add_flags, check_settings, read_environment, setting
from gptlib.inference.quantize import QUANTIZE_CHOICES
from gptlib.serving.access import (
    RateLimit,
    client_address,
    has_key,
    is_loopback,
    register_authentication,
    register_cors,
    register_host_check,
    split_list,
)
from gptlib.serving.answers import CompletionAnswer, GenerateAnswer, respond
from gptlib.serving.api import (
    DEFAULT_MAX_TOKENS,
    VERSION,
    ApiError,
    check_completion,
    check_context,
    check_echo,
    encode_prompt,
    encode_prompts,
    error_response,
    job_error,
    openapi,
    read_body,
    request_models,
    split_prompts,
)
from gptlib.serving.http_server import (
    create_server,
    disconnect_check,
    stop_listening,
    wait_until_sent,
)
from gptlib.serving.service import JobError, Service
from inference import DEFAULT_CHECKPOINT, load_for_sampling

PAGE = Path(__file__).resolve().parent / "gptlib" / "serving" / "page"
PAGE_FILES = {"page": "index.html", "page_style": "page.css", "page_script": "page.js"}
WITHOUT_KEY = {"health", *PAGE_FILES}  # endpoints that need no API key
CONTENT_SECURITY_POLICY = "; ".join([
    "default-src 'none'",
    "connect-src 'self'",
    "style-src 'self'",
    "script-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
])

# -----------------------------------------------------------------------------
# settings: one dataclass makes the environment variables, the flags, their checks and the table
# in the documents


@dataclasses.dataclass
class Settings:
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 is every address of this machine")
    port: int = setting(5000, "port to listen on; 0 takes a free one", 0, 65535)
    model_checkpoint: str = setting(
        DEFAULT_CHECKPOINT, "a file, a Hugging Face directory or a GPT-2 name")
    model_name: str = setting("", "what clients call the model (default: the checkpoint's name)")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "data type of the weights",
                         choices=("auto", "float32", "bfloat16", "float16"))
    quantize: str = setting("none", "int8: the linear layers in 8 bits, faster and half as large",
                            choices=QUANTIZE_CHOICES)
    compile: bool = setting(False, "torch.compile the decode step: a slower start, then faster")
    api_key: str = setting("", "API key that clients must send; /health and / are exempt "
                           "(default: no authentication)")
    allowed_hosts: str = setting(
        "", "host names, separated by commas, that a server on this machine's own address without "
        "an API key answers to, beside localhost")
    cors_origins: str = setting(
        "", "web pages that may ask from a browser: origins such as https://example.com, separated "
        "by commas, or * (default: none)")
    trusted_proxies: int = setting(
        0, "proxies of yours that a request passes; each one's X-Forwarded-For is believed", 0)
    rate_limit: str = setting(
        "", "sequences of text for one address, as \"60 per minute\" or \"5/second\" (default: "
        "unlimited)")
    max_length_limit: int = setting(1024, "most new tokens in a sequence", 1)
    max_prompt_length: int = setting(
        32768, "most characters, or token ids, in a prompt", 1)
    max_body_size: int = setting(1048576, "most bytes in a request's body", 1)
    slots: int = setting(8, "sequences that are decoded at a time", 1, 1024)
    queue_size: int = setting(
        64, "sequences that may wait for a slot; more are refused with 429", 0, 10000)
    prefill_chunk: int = setting(
        64, "tokens of prompts read between two tokens of the running sequences; 0: whole prompts",
        0)
    prefix_reuse: bool = setting(
        True, "the beginning of a prompt that the cache holds already is not read again")
    request_timeout: float = setting(
        300.0, "seconds after which an unfinished request gets 504", 0.01)
    step_timeout: float = setting(
        120.0, "seconds that one step of the model may take before /health answers 503", 0.01)

    def __post_init__(self):
        check_settings(self, str.upper)


def read_settings(argv=(), env=None):
    """Settings from the environment, overridden by flags. Raises UserError for invalid ones."""
    parser = ArgumentParser(__doc__)
    add_flags(parser, Settings)
    flags = vars(parser.parse_args(list(argv)))
    env = os.environ if env is None else env
    key = flags.get("api_key", env.get("API_KEY"))
    if key is not None and not key.strip():
        # an empty variable is what a forgotten secret leaves: it must not open the server
        raise UserError("API_KEY is set, but empty: give a key, or leave it out")
    variables = read_environment(Settings, env)
    return Settings(**{**variables, **flags})


# -----------------------------------------------------------------------------
# the app


def make_service(settings):
    """The Service that these settings ask for."""
    def load():
        return load_for_sampling(settings.model_checkpoint, settings.device, settings.dtype,
                                 settings.quantize)

    # latest_checkpoint.pt is a link: the name is that of the file it leads to
    checkpoint_name = Path(settings.model_checkpoint).resolve().stem
    return Service(
        load, settings.model_name or checkpoint_name, settings.slots, settings.queue_size,
        settings.request_timeout, settings.step_timeout, compile=settings.compile,
        prefill_chunk=settings.prefill_chunk, prefix_reuse=settings.prefix_reuse)


def create_app(settings=None):
    """The Flask app. Its service, app.extensions["service"], has yet to be started."""
    from flask import Flask

    settings = settings or read_settings()
    service = make_service(settings)
    models = request_models(settings.max_prompt_length, settings.max_length_limit,
                            service.capacity)
    app = Flask(__name__, static_folder=None)
    app.extensions["service"] = service
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_size
    app.json.sort_keys = False
    register_errors(app, settings.max_body_size)
    register_metrics(app, service)
    register_access(app, settings)
    register_text_routes(app, service, settings, models)
    register_status_routes(app, service, settings, models)
    register_page(app)
    return app


def register_access(app, settings):
    """Check host name, origin and key of each request, in this order."""
    is_private = is_loopback(settings.host)
    if is_private and not settings.api_key:
        register_host_check(app, split_list(settings.allowed_hosts.lower()))
    if not is_private and not settings.api_key:
        warn(f"HOST is {settings.host} and there is no API_KEY: whoever reaches this address may "
             "use the server")
    if settings.cors_origins:
        register_cors(app, split_list(settings.cors_origins))
    if settings.api_key:
        register_authentication(app, settings.api_key, WITHOUT_KEY)


def register_metrics(app, service):
    """Count every response, time it to its end, and serve /metrics."""
    from flask import Response, request
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    @app.before_request
    def begin():
        request.environ["serve.start"] = time.monotonic()

    @app.after_request
    def count(response):
        # one label for unknown paths: clients must not be able to create labels
        route = request.url_rule.rule if request.url_rule else "other"
        start = request.environ.get("serve.start", time.monotonic())

        def observe_latency():
            service.metrics.latency.labels(route).observe(time.monotonic() - start)

        service.metrics.requests.labels(route, response.status_code).inc()
        response.call_on_close(observe_latency)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/metrics")
    def metrics():
        text = generate_latest(service.metrics.registry)
        return Response(text, content_type=CONTENT_TYPE_LATEST)


def register_errors(app, max_body_size):
    """Answer every error in JSON, without details of an internal one."""
    from flask import request
    from werkzeug.exceptions import HTTPException

    @app.errorhandler(Exception)
    def answer_error(error):
        if isinstance(error, ApiError):
            return error_response(error)
        if isinstance(error, JobError):
            return error_response(job_error(error))
        if isinstance(error, UserError):
            return error_response(ApiError(400, str(error)))
        if isinstance(error, HTTPException):
            return answer_http_error(error)
        traceback.print_exception(error)
        message = "this server has failed on the request; its log says why"
        return error_response(ApiError(500, message))

    def answer_http_error(error):
        message = f"{error.name}: {request.method} {request.path[:100]}"
        if error.code == 413:
            message = (f"the body is too large: expected at most {max_body_size} bytes "
                       "(MAX_BODY_SIZE)")
        response = error_response(ApiError(error.code, message))
        if error.code == 405:
            response.headers["Allow"] = ", ".join(error.valid_methods)
        return response


# -----------------------------------------------------------------------------
# routes


def register_text_routes(app, service, settings, models):
    """POST /generate and POST /v1/completions."""
    from flask import request
    Generate, Completion = models
    rate_limit = RateLimit(settings.rate_limit)

    def read(model):
        """The body, and a function that counts its sequences; a bad body counts as one."""
        service.check_open()
        address = client_address(request, settings.trusted_proxies)
        rate_limit.count(address)

        def count(n):
            rate_limit.check_size(n)
            rate_limit.count(address, n - 1)

        return read_body(model), count

    @app.post("/generate")
    def generate():
        body, count = read(Generate)
        count(body.num_samples)
        tokens = encode_prompt(service.tokenizer, body.prompt)
        job = submit(service, body, [tokens] * body.num_samples, "num_samples", body.max_length)
        answer = GenerateAnswer(job, body.prompt, len(tokens), service.name)
        return respond(job, answer, body.stream)

    @app.post("/v1/completions")
    def completions():
        body, count = read(Completion)
        check_model_name(service, body.model)
        n = body.n or 1
        check_completion(Completion, body)
        prompts = split_prompts(body.prompt, settings.max_prompt_length)
        service.check_size(len(prompts) * n, "prompt")
        count(len(prompts) * n)
        prompts = encode_prompts(service.tokenizer, prompts)
        if body.logprobs is not None:
            check_context(prompts, service.about["context"])
        echo = [""] * len(prompts)
        if body.echo:
            echo = [service.tokenizer.decode(prompt) for prompt in prompts]
            check_echo(echo, n, settings.max_body_size)
        max_length = min(DEFAULT_MAX_TOKENS, settings.max_length_limit)
        if body.max_tokens is not None:
            max_length = max(1, body.max_tokens)
        job = submit(service, body, [prompt for prompt in prompts for _ in range(n)], "prompt",
                     max_length, body.logprobs, bool(body.echo) and body.logprobs is not None)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        n_prompt_tokens = sum(len(prompt) for prompt in prompts)
        answer = CompletionAnswer(
            job, service.name, n_prompt_tokens, [text for text in echo for _ in range(n)],
            only_echo=body.max_tokens == 0, include_usage=include_usage)
        return respond(job, answer, body.stream)

    @app.post("/v1/chat/completions")
    def chat():
        raise ApiError(404, "this is a base model, which continues a text and does not chat: use "
                       "POST /v1/completions with a prompt", code="not_a_chat_model")


def check_model_name(service, name):
    """Raise ApiError 404 for a model that is not the one served; None is that one."""
    if name not in (None, service.name):
        raise ApiError(404, f"no model {name[:100]!r} here: expected {service.name!r}",
                       "model", "model_not_found")


def submit(service, body, prompts, field, max_length, n_logprobs=None, of_prompt=False):
    """Queue a sequence for each prompt, sampled as the body says. Returns the Job."""
    from flask import request
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    temperature = 1.0 if body.temperature is None else body.temperature
    return service.submit(
        prompts, field, stop, disconnect_check(request.environ), n_logprobs, of_prompt,
        max_length=max_length, temperature=temperature, top_k=body.top_k, top_p=body.top_p,
        seed=body.seed)


def register_status_routes(app, service, settings, models):
    """GET /health, /v1/models and /openapi.json."""
    from flask import jsonify, request

    @app.get("/health")
    def health():
        status, about = service.health(), dict(service.about)
        if settings.api_key and not has_key(request, settings.api_key):
            about.pop("sample_prompt", None)  # it may be the training text's
        slots_in_use, queue = service.occupancy()
        body = dict(
            status=status, **about, slots=settings.slots,
            slots_in_use=slots_in_use, queue=queue, max_length_limit=settings.max_length_limit,
            key_required=bool(settings.api_key), version=VERSION)
        return jsonify(body), 200 if status == "healthy" else 503

    @app.get("/v1/models", defaults={"name": None})
    @app.get("/v1/models/<path:name>")
    def list_models(name):
        if not service.model:
            service.check_open()
        check_model_name(service, name)
        card = dict(id=service.name, object="model", created=service.created, owned_by="local")
        return jsonify(card if name else dict(object="list", data=[card]))

    @app.get("/openapi.json")
    def description():
        return jsonify(openapi(models))


def register_page(app):
    """GET /, /page.css and /page.js: the page to try the model."""
    from flask import send_from_directory

    def send(name):
        response = send_from_directory(PAGE, name)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return response

    @app.get("/")
    def page():
        return send(PAGE_FILES["page"])

    @app.get("/page.css")
    def page_style():
        return send(PAGE_FILES["page_style"])

    @app.get("/page.js")
    def page_script():
        return send(PAGE_FILES["page_script"])


def __getattr__(name):
    """Make and start `app` when `gunicorn serve:app` asks for it, not when this is imported."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = app = create_app()
    app.extensions["service"].start()
    return app


# -----------------------------------------------------------------------------
# the command


class StopFlag:
    """Set by the first SIGTERM or SIGINT; the second one exits at once.

    A signal handler must take no lock, as an Event's set() does: the main thread may hold it.
    """

    def __init__(self):
        self.is_set = False
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)

    def on_signal(self, *_):
        if self.is_set:
            os._exit(1)
        self.is_set = True


def main():
    settings = read_settings(sys.argv[1:])
    app = create_app(settings)
    service = app.extensions["service"]
    server = create_server(app, settings.host, settings.port, service.capacity,
                           settings.max_body_size)
    stop = StopFlag()
    threading.Thread(target=server.run, name="http", daemon=True).start()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{server.effective_port}"
    log(f"listening on {address}, loading {settings.model_checkpoint}")
    service.start()
    while not stop.is_set and service.status != "failed":
        time.sleep(0.1)
    if service.status == "failed":
        sys.exit(1)
    stop_listening(server)
    log("finishing the requests in flight")
    service.drain()
    wait_until_sent(server, seconds=5)
    if service.is_hung():
        log("error: the model hangs, exiting without it")
        os._exit(1)  # Python would wait for the engine's thread
    server.task_dispatcher.shutdown()


if __name__ == "__main__":
    run_main(main)
