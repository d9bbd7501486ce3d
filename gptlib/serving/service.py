"""The thread that owns the model, the jobs it works on, and their metrics."""

import atexit
import dataclasses
import threading
import time
import traceback

from gptlib.common import log
from gptlib.inference.engine import Engine
from gptlib.inference.sampling import SamplingParams
from gptlib.inference.text import TextStream
from gptlib.runtime import use_one_thread_if_small

MOST_FAILURES = 8  # requests that fail one after the other, with none that succeeds between them
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)

# -----------------------------------------------------------------------------
# why a job is refused, or ends before its text does; the routes give each a status


class JobError(Exception):
    """The base class. The message is for the client."""


class NotReady(JobError):
    """The model is still being loaded, or does not answer."""


class Closing(JobError):
    """No more jobs are accepted."""


class TooManySequences(JobError):
    """More sequences than can ever fit. field: the request's field that asks for them."""

    def __init__(self, message, field):
        super().__init__(message)
        self.field = field


class QueueFull(JobError):
    """More sequences than fit now."""


class Disconnected(JobError):
    """The client has hung up."""


class DeadlinePassed(JobError):
    """The job took longer than it may."""


class ModelFailed(JobError):
    """The model raised an exception."""


# -----------------------------------------------------------------------------


class Metrics:
    """The Prometheus metrics of /metrics."""

    def __init__(self, service):
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Histogram,
            ProcessCollector,
            disable_created_metrics,
        )
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "gpt2_http_requests_total", "HTTP requests answered", ["route", "code"],
            registry=registry)
        self.latency = Histogram(
            "gpt2_http_request_duration_seconds", "From a request to the end of its answer",
            ["route"], registry=registry, buckets=LATENCY_BUCKETS)
        self.first_token = Histogram(
            "gpt2_time_to_first_token_seconds", "From a request to its first token",
            registry=registry, buckets=LATENCY_BUCKETS)
        self.sequences = Counter(
            "gpt2_sequences_total", "Finished sequences, by reason", ["finish_reason"],
            registry=registry)
        self.prompt_tokens = Counter(
            "gpt2_prompt_tokens_total", "Tokens of prompts, counted for each sequence",
            registry=registry)
        self.reused_tokens = Counter(
            "gpt2_reused_prompt_tokens_total",
            "Tokens of prompts that were in the cache already and were not read again",
            registry=registry)
        self.tokens = Counter(
            "gpt2_generated_tokens_total", "Tokens generated", registry=registry)
        self._add_gauges(service)

    def _add_gauges(self, service):
        from prometheus_client import Gauge
        slots = Gauge("gpt2_slots", "Sequences that can be decoded at a time",
                      registry=self.registry)
        slots.set_function(lambda: service.slots)
        slots_in_use = Gauge("gpt2_slots_in_use", "Sequences that are being decoded",
                             registry=self.registry)
        slots_in_use.set_function(lambda: service.occupancy()[0])
        queue = Gauge("gpt2_queue_sequences", "Sequences that wait for a slot",
                      registry=self.registry)
        queue.set_function(lambda: service.occupancy()[1])


class Job:
    """The sequences of one HTTP request, which are admitted, timed and released together.

    is_disconnected: a function that returns whether the client has hung up.
    """

    def __init__(self, service, sequences, stop, is_disconnected):
        self.service = service
        self.sequences = sequences
        self.is_disconnected = is_disconnected
        self.start = time.monotonic()
        self.deadline = self.start + service.timeout
        self.streams = [TextStream(s, service.tokenizer, stop, deadline=self.deadline)
                        for s in sequences]
        self.has_first_token = False

    def pieces(self):
        """Yield (index, text) as text comes, and (index, None) at the end of each sequence.

        The sequences take turns. Raises JobError if one ends before its text does.
        """
        unfinished = {index: iter(stream) for index, stream in enumerate(self.streams)}
        while unfinished:
            for index in list(unfinished):
                try:
                    piece = next(unfinished[index], None)
                except TimeoutError:  # the engine's thread may hang: whoever waits keeps the time
                    self.cancel("timeout")
                    raise self.deadline_passed() from None
                if piece is None:
                    del unfinished[index]
                    self.check_finished(self.sequences[index])
                yield index, piece

    def check_finished(self, sequence):
        """Raise JobError for a sequence that was cancelled, timed out or failed."""
        if sequence.finish_reason == "cancelled":
            raise Disconnected("the client has disconnected")
        if sequence.finish_reason == "timeout":
            raise self.deadline_passed()
        if sequence.finish_reason not in ("stop", "length"):
            raise ModelFailed("the model failed on this request; the server's log says why")

    def deadline_passed(self):
        limit = self.service.timeout
        return DeadlinePassed(f"not done within {limit:g} seconds (REQUEST_TIMEOUT)")

    def cancel(self, reason):
        for sequence in self.sequences:
            sequence.cancel(reason)

    def count_unfinished(self):
        """How many sequences take, or wait for, a slot: not those whose text is being sent."""
        return sum(not sequence.ended for sequence in self.sequences)

    def note_first_token(self):
        """Record how long the first token took, once there is one."""
        if not self.has_first_token and any(s.tokens for s in self.sequences):
            self.has_first_token = True
            self.service.metrics.first_token.observe(time.monotonic() - self.start)

    def close(self):
        """Release the slots and count the tokens. Safe to call more than once."""
        service = self.service
        with service.lock:
            if self not in service.jobs:
                return
            service.jobs.remove(self)
        self.note_first_token()  # a short job may end before the engine's thread looks at it
        self.cancel("cancelled")
        service.note_end(self.sequences)
        for sequence in self.sequences:
            service.metrics.sequences.labels(sequence.finish_reason).inc()
            service.metrics.tokens.inc(len(sequence.tokens))
            service.metrics.reused_tokens.inc(sequence.n_reused)
        service.wake.set()


class Service:
    """The model, the thread that owns it, and the jobs it works on.

    load() returns an object with .model, .tokenizer, .quantize, .step and .sample_prompt; name:
    what clients call the model; timeout: seconds that a job may take; step_timeout: seconds that
    one step of the model may take; engine_options: more arguments of Engine. status is "loading",
    "failed", "healthy", "draining" or "closed"; health() also tells a model that does not work.
    """

    def __init__(self, load, name, slots=8, queue_size=64, timeout=300.0, step_timeout=120.0,
                 **engine_options):
        self.load = load
        self.name = name
        self.slots = slots
        self.capacity = slots + queue_size  # sequences
        self.timeout = timeout
        self.step_timeout = step_timeout
        self.step_began = None  # when the step under way began
        self.failures = 0  # since the last request that did not fail
        self.last_error = None  # the exception that was counted last
        self.engine_options = engine_options
        self.status = "loading"
        self.error = None  # the exception, if loading has failed
        self.model = self.tokenizer = self.engine = None
        self.about = {}  # what /health says about the model, once it is loaded
        self.created = int(time.time())
        self.jobs = set()
        self.lock = threading.Lock()  # guards status and jobs
        self.wake = threading.Event()  # the engine's thread has something to do
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.metrics = Metrics(self)

    def start(self):
        """Load the model and work on jobs, in a thread of its own."""
        self.thread.start()
        # torch crashes at exit while a thread is still inside it
        atexit.register(self.close)
        return self

    def close(self):
        """Stop the engine's thread."""
        self.status = "closed"
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(timeout=10)

    def _run(self):
        try:
            self._load()
        except Exception as error:
            self.status, self.error = "failed", error
            log(f"error: {error}")
            return
        with self.lock:
            is_ready = self.status == "loading"  # a signal may have come meanwhile
            if is_ready:
                self.status = "healthy"
        if is_ready:
            line = "serving {model}: {parameters:,} parameters, {device}, {dtype}"
            if self.about["quantize"] != "none":
                line += ", {quantize}"
            log(line.format(**self.about))
        while self.status != "closed":
            # cleared before the step: work that arrives during it wakes the next round
            self.wake.clear()
            if not self._step():
                self.wake.wait()

    def _step(self):
        """Generate a token for every sequence in a slot. Returns False when there is none."""
        self.step_began = time.monotonic()
        try:
            self._expire_jobs()
            return self.engine.step()
        except Exception as error:
            # not the fault of one request: those in slots are lost, those that wait are not
            self.note_failure(error)
            self.engine.abort(error)
            return True
        finally:
            self.step_began = None

    def _load(self):
        loaded = self.load()
        model, tokenizer = loaded.model, loaded.tokenizer
        parameters = sum(p.numel() for p in model.parameters())
        use_one_thread_if_small(model)
        engine = Engine(model, self.slots, tokenizer.n_vocab, tokenizer.eot_token,
                        **self.engine_options)
        engine.warm_up()
        weight = model.lm_head.weight
        self.tokenizer, self.engine = tokenizer, engine
        self.about = dict(
            model=self.name, step=loaded.step, parameters=parameters,
            context=model.config.block_size, device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."), quantize=loaded.quantize,
            sample_prompt=loaded.sample_prompt)
        # the engine's copy: with the loaded model gone, weights that were packed are held once
        self.model = engine.model

    def _expire_jobs(self):
        """Note first tokens; cancel jobs past their deadline and those whose client has left."""
        now = time.monotonic()
        for job in list(self.jobs):
            job.note_first_token()
            if now > job.deadline:
                job.cancel("timeout")
            elif job.is_disconnected():
                job.cancel("cancelled")

    def note_end(self, sequences):
        """Count failed requests in a row; a cancelled one says nothing about the model."""
        errors = [sequence.error for sequence in sequences if sequence.error]
        if errors:
            self.note_failure(errors[0])
        elif any(sequence.finish_reason in ("stop", "length") for sequence in sequences):
            self.failures = 0

    def note_failure(self, error):
        """Print an error and count it: once, however many requests a step has lost by it."""
        if error is not self.last_error:
            traceback.print_exception(error)
            self.failures += 1
            self.last_error = error.with_traceback(None)  # whose frames hold tensors

    def health(self):
        """The status; or "hung" if a step takes too long, "failing" if request after request
        fails. A supervisor should then restart the process.
        """
        if self.status != "healthy":
            return self.status
        if self.is_hung():
            return "hung"
        return "failing" if self.failures >= MOST_FAILURES else "healthy"

    def is_hung(self):
        """Whether the step under way takes longer than any should."""
        began = self.step_began
        return began is not None and time.monotonic() - began > self.step_timeout

    def occupancy(self):
        """(sequences that have a slot, sequences that wait for one)."""
        if self.engine is None:
            return 0, 0
        engine = self.engine
        return len(engine.live) + (engine.filling is not None), len(engine.waiting)

    def check_open(self):
        """Raise NotReady or Closing unless jobs are accepted."""
        if self.status == "loading":
            raise NotReady("the model is still being loaded, try again in a moment")
        if self.is_hung():
            raise NotReady(f"the model has not answered for {self.step_timeout:g} seconds")
        if self.status != "healthy":
            raise Closing(f"this server accepts no more requests, it is {self.status}")

    def check_size(self, n, field):
        """Raise TooManySequences if n can never fit; field: the request's field that asks for n."""
        if n > self.capacity:
            raise TooManySequences(
                f"{field} makes {n} sequences: expected at most {self.capacity}", field)

    def submit(self, prompts, field, stop, is_disconnected, n_logprobs=None, of_prompt=False,
               **sampling):
        """Queue prompts, lists of token ids, as one Job; sequence i uses the seed `seed` + i.

        n_logprobs, of_prompt: as in Engine.submit. sampling: the fields of SamplingParams. Raises
        a JobError if it cannot be accepted, and UserError for settings out of range.
        """
        params = SamplingParams(**sampling)
        n = len(prompts)
        self.check_size(n, field)
        with self.lock:
            self.check_open()
            in_flight = sum(job.count_unfinished() for job in self.jobs)
            if in_flight + n > self.capacity:
                raise QueueFull("all slots are taken and the queue is full, try again in a moment")
            sequences = []
            for i, prompt in enumerate(prompts):
                own = dataclasses.replace(params, seed=params.seed + i)
                sequences.append(self.engine.submit(prompt, own, n_logprobs, of_prompt))
            job = Job(self, sequences, stop, is_disconnected)
            self.jobs.add(job)
        self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt in prompts))
        self.wake.set()
        return job

    def drain(self):
        """Refuse new jobs and wait until those in flight are done, or the model hangs."""
        with self.lock:
            self.status = "draining"
        while self.jobs and not self.is_hung():
            time.sleep(0.02)
