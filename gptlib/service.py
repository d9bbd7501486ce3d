"""The thread that owns the model, the jobs it works on, and its metrics."""

import atexit
import random
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from gptlib.api import ApiError
from gptlib.engine import Engine, TextStream


def say(text):
    print(text, file=sys.stderr, flush=True)


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

    def __init__(self, settings, load_model):
        self.load_model = load_model
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
        model = self.load_model(settings.model_checkpoint, settings.device, settings.dtype)
        parameters = sum(p.numel() for p in model.parameters())
        if parameters < 10**7:
            torch.set_num_threads(1)  # a step of a small model is over before a second thread has woken
        tokenizer = model.tokenizer
        engine = Engine(model, settings.slots, tokenizer.n_vocab, tokenizer.eot_token, settings.compile)
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
