"""What the text routes answer: events() for a stream, build_body() once all events have come."""

import codecs
import json
import time
import uuid
from itertools import chain

from gptlib.serving.api import job_error
from gptlib.serving.service import JobError

LEAST_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI's API writes this


class GenerateAnswer:
    """The answer of /generate, for the samples of one job."""

    def __init__(self, job, prompt, n_prompt_tokens, model_name):
        self.job = job
        self.prompt = prompt
        self.n_prompt_tokens = n_prompt_tokens
        self.model_name = model_name

    def sample(self, index):
        stream, sequence = self.job.streams[index], self.job.sequences[index]
        return dict(generated_text=self.prompt + stream.text, tokens_generated=stream.n_tokens,
                    finish_reason=sequence.finish_reason, seed=sequence.seed)

    def events(self):
        """A dict for each piece of text, and a last one for each sample with all about it."""
        for index, piece in self.job.pieces():
            if piece is not None:
                yield dict(index=index, text=piece)
            else:
                yield dict(index=index, text="", **self.sample(index))

    def build_body(self):
        """The first sample, and the list of all samples if there are several."""
        samples = [self.sample(index) for index in range(len(self.job.sequences))]
        body = dict(prompt=self.prompt, **samples[0], model=self.model_name,
                    prompt_tokens=self.n_prompt_tokens)
        if len(samples) > 1:
            body["samples"] = samples
        return body


class CompletionAnswer:
    """The answer of /v1/completions, in OpenAI's form.

    n_prompt_tokens: of all prompts, each counted once; echo: the text that comes before each
    sequence's own; only_echo: nothing else was asked for, and the one token that the engine has
    sampled is left out; include_usage: whether a stream ends with the token counts.
    """

    def __init__(self, job, model_name, n_prompt_tokens, echo, only_echo, include_usage):
        self.job = job
        self.n_prompt_tokens = n_prompt_tokens
        self.echo = echo
        self.only_echo = only_echo
        self.include_usage = include_usage
        self.head = dict(id=f"cmpl-{uuid.uuid4().hex}", object="text_completion",
                         created=int(time.time()), model=model_name)

    @staticmethod
    def choice(index, text, finish_reason=None, logprobs=None):
        return dict(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)

    def chunk(self, choice):
        """One event; with include_usage all but the last have a `usage` of null, as OpenAI's do."""
        chunk = dict(**self.head, choices=[choice])
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def usage(self):
        generated = sum(stream.n_tokens for stream in self.job.streams)
        if self.only_echo:
            generated = 0
        return dict(prompt_tokens=self.n_prompt_tokens, completion_tokens=generated,
                    total_tokens=self.n_prompt_tokens + generated)

    def events(self):
        """A chunk for each echoed prompt, each piece of text and the end of each sequence."""
        for index, text in enumerate(self.echo):
            if text:
                yield self.chunk(self.choice(index, text))
        for index, piece in self.job.pieces():
            has_ended = piece is None
            if self.only_echo and not has_ended:
                continue
            finish_reason = self.finish_reason(index) if has_ended else None
            yield self.chunk(self.choice(index, piece or "", finish_reason))
        if self.include_usage:
            yield dict(**self.head, choices=[], usage=self.usage())

    def build_body(self):
        choices = []
        for index, stream in enumerate(self.job.streams):
            text = self.echo[index]
            if not self.only_echo:
                text += stream.text
            choices.append(self.choice(index, text, self.finish_reason(index),
                                       self.logprobs(stream)))
        return dict(**self.head, usage=self.usage(), choices=choices)

    def finish_reason(self, index):
        return "length" if self.only_echo else self.job.sequences[index].finish_reason

    def logprobs(self, stream):
        """OpenAI's logprobs of the prompt's tokens, if it is echoed, and of those generated.

        The token that ended the text, <|endoftext|>, is among them.
        """
        sequence, tokenizer = stream.sequence, stream.tokenizer
        if sequence.n_logprobs is None:
            return None
        n = 0 if self.only_echo else stream.n_tokens
        generated = sequence.logprobs[:n + 1]
        has_stop_token = not self.only_echo and len(generated) > n and (
            sequence.finish_reason == "stop" and generated[n].token == tokenizer.eot_token)
        if not has_stop_token:
            generated = generated[:n]
        offset = 0 if sequence.of_prompt else len(tokenizer.decode(sequence.prompt))
        return logprobs_body(tokenizer, sequence.prompt_logprobs + generated, offset)


def logprobs_body(tokenizer, entries, offset):
    """TokenLogprobs in OpenAI's form: four lists, with an item for each token.

    offset: where the first token begins in the text, in characters. Texts of different tokens may
    be equal (parts of a character): the larger value stays, so that the best token's is there.
    """
    def text_of(token):
        return tokenizer.decode_single_token_bytes(token).decode(errors="replace")

    body = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, logprob, top in entries:
        likeliest = None
        if logprob is not None:
            likeliest = {}
            for other, value in [*top, (token, logprob)]:
                text = text_of(other)
                likeliest[text] = max(value, likeliest.get(text, LEAST_LOGPROB))
            logprob = max(logprob, LEAST_LOGPROB)
        body["tokens"].append(text_of(token))
        body["token_logprobs"].append(logprob)
        body["top_logprobs"].append(likeliest)
        body["text_offset"].append(offset)
        offset += len(decoder.decode(tokenizer.decode_single_token_bytes(token)))
    return body


def sse_stream(events):
    """Events, dicts, as server-sent events; a JobError on the way becomes the last event."""
    try:
        for event in events:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
    except JobError as error:
        yield f"data: {json.dumps(job_error(error).body())}\n\n"


def respond(job, answer, stream):
    """The HTTP response for a job: its events as they come, or one body when it is done.

    An error before the first event still gets its HTTP status; a later one is sent as an event.
    """
    from flask import Response, jsonify
    events = answer.events()
    if not stream:
        try:
            for _ in events:  # an answer collects its texts as its events pass
                pass
        finally:
            job.close()
        return jsonify(answer.build_body())
    try:
        first = next(events)
    except BaseException:
        job.close()
        raise
    # X-Accel-Buffering: nginx passes events on as they come
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = Response(sse_stream(chain([first], events)), mimetype="text/event-stream",
                        headers=headers)
    response.call_on_close(job.close)  # at the end of the text, or when the client disconnects
    return response
