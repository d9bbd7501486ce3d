"""The HTTP interface: bodies of requests, errors and the OpenAPI description.

The ranges of the sampling settings are those of SamplingParams; only the limits that are the
server's own (how long, how many) are stated here.
"""

import codecs
import dataclasses
import json
from typing import Annotated, Literal

from gptlib.common import UserError
from gptlib.config import EXPECTED, describe_range, setting
from gptlib.data.tokenizer import encode_text
from gptlib.inference.sampling import SamplingParams
from gptlib.serving import service

VERSION = "1.0.0"

MAX_TOP_K = 10**6  # far above any vocabulary
MAX_SEED = 2**63 - 1  # the largest integer that every JSON client can send
MAX_STOP_TEXTS = 64  # OpenAI's API has 4, clients that evaluate send more
MAX_STOP_LENGTH = 200  # characters
MAX_LOGPROBS = 5  # as OpenAI's API has it
MAX_NAME_LENGTH = 500  # characters
MAX_ENTRIES = 10  # in an object within a body
DEFAULT_MAX_LENGTH = 100  # of /generate
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API

# -----------------------------------------------------------------------------
# errors


class ApiError(Exception):
    """An error that a client gets instead of an answer.

    status: the HTTP status; field: the field of the body at fault; code: a name that programs can
    test for; retry_after: seconds to wait before another attempt.
    """

    def __init__(self, status, message, field=None, code=None, retry_after=None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.code = code
        self.retry_after = retry_after

    def body(self):
        """The error in the form of OpenAI's API."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, other)
        return dict(error=dict(message=self.message, type=kind, param=self.field, code=self.code))


CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that hung up; only the metrics see it

# status, code and Retry-After of what the service raises
JOB_ERRORS = {
    service.NotReady: dict(status=503, retry_after=2),
    service.Closing: dict(status=503, retry_after=10),
    service.TooManySequences: dict(status=400),
    service.QueueFull: dict(status=429, code="queue_full", retry_after=1),
    service.Disconnected: dict(status=CLIENT_CLOSED_REQUEST),
    service.DeadlinePassed: dict(status=504),
    service.ModelFailed: dict(status=500),
}


def job_error(error):
    """The ApiError for a JobError of the service."""
    field = getattr(error, "field", None)
    return ApiError(message=str(error), field=field, **JOB_ERRORS[type(error)])


def error_response(error):
    """The Flask response for an ApiError."""
    from flask import jsonify
    response = jsonify(error.body())
    response.status_code = error.status
    if error.retry_after:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


# -----------------------------------------------------------------------------
# request bodies: a field's description says what is expected, and error messages quote it


def as_integer(bound):
    """Write a bound of 2.0 as 2."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def number_field(kind, default, low=None, high=None, above=None, note=""):
    """A pydantic field for a number in a range; its description states the range.

    kind: int or float; low and high are allowed values, `above` is not.
    """
    from pydantic import Field
    low, high, above = as_integer(low), as_integer(high), as_integer(above)
    numbers = describe_range(setting(default, note, low, high, above=above))
    if above is None:
        numbers = f"from {numbers}"
    bounds = dict(ge=low, le=high, gt=above)
    stated = {name: bound for name, bound in bounds.items() if bound is not None}
    return Field(default, description=f"{EXPECTED[kind]} {numbers}{note}", **stated)


def sampling_field(name, default, high=None, note=""):
    """The pydantic field for a setting of SamplingParams, with its range and its help.

    high: the server's own upper limit, if SamplingParams has none.
    """
    declared = next(f for f in dataclasses.fields(SamplingParams) if f.name == name)
    known = declared.metadata
    high = known["high"] if high is None else high
    note = f": {known['help']}{note}"
    return number_field(declared.type, default, known["low"], high, known["above"], note)


UNSUPPORTED = "it is not supported"


def unsupported_field(value, **bounds):
    """A field of OpenAI's API that is accepted only with the value that changes nothing."""
    from pydantic import Field
    description = f"{UNSUPPORTED}: leave it out, or give {value}"
    return Field(None, description=description, **bounds)


def list_of(kind, **bounds):
    """The pydantic type of a list; validation stops at its first wrong element."""
    from pydantic import Field
    return Annotated[list[kind], Field(fail_fast=True, **bounds)]


def describe_prompt(limit):
    """What the prompt of a completion may be."""
    return f"a text of at most {limit} characters, as many token ids, or a list of such"


def strict_body():
    """The pydantic base class of all bodies: no conversions, no unknown fields, no NaN."""
    from pydantic import BaseModel, ConfigDict

    class Body(BaseModel):
        model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    return Body


def sampling_body():
    """The fields that /generate and /v1/completions have in common."""
    from pydantic import Field
    StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
    StopTexts = list_of(StopText, max_length=MAX_STOP_TEXTS)
    stop_texts = (f"a text of 1 to {MAX_STOP_LENGTH} characters, or up to {MAX_STOP_TEXTS} "
                  "of them, that ends the continuation")

    class Sampling(strict_body()):
        top_p: float | None = sampling_field("top_p", None, note="; null: from all")
        seed: int | None = sampling_field("seed", None, MAX_SEED, "; sample i uses seed + i")
        stop: StopText | StopTexts | None = Field(None, description=stop_texts)
        stream: bool | None = Field(
            False, description="true or false; true sends server-sent events")

    return Sampling


def generate_body(prompt_limit, length_limit, capacity):
    """The body of /generate, as a pydantic model."""
    from pydantic import Field

    class Generate(sampling_body()):
        prompt: str = Field(
            max_length=prompt_limit,
            description=f"a text of at most {prompt_limit} characters")
        max_length: int = sampling_field(
            "max_length", min(DEFAULT_MAX_LENGTH, length_limit), length_limit)
        temperature: float = sampling_field("temperature", 0.8)
        top_k: int | None = sampling_field("top_k", 50, MAX_TOP_K, "; null: from all")
        num_samples: int = number_field(int, 1, 1, capacity)

    return Generate


def completion_body(prompt_limit, length_limit, capacity):
    """The body of /v1/completions, as a pydantic model: OpenAI's fields."""
    from pydantic import Field

    class StreamOptions(strict_body()):
        include_usage: bool | None = None
        include_obfuscation: bool | None = None  # nothing is obfuscated here

    Prompt = str | list_of(str) | list_of(int) | list_of(list_of(int))
    class Completion(sampling_body()):
        model: str | None = Field(
            None, max_length=MAX_NAME_LENGTH, description="the name that /v1/models lists")
        prompt: Prompt = Field(
            max_length=prompt_limit, description=describe_prompt(prompt_limit))
        max_tokens: int | None = number_field(
            int, min(DEFAULT_MAX_TOKENS, length_limit), 0, length_limit,
            note=": new tokens at most, a sample; 0 with echo alone")
        temperature: float | None = sampling_field("temperature", 1.0)
        top_k: int | None = sampling_field("top_k", None, MAX_TOP_K, "; null: from all")
        n: int | None = number_field(int, 1, 1, capacity)
        stream_options: StreamOptions | None = Field(
            None, description='{"include_usage": true} or null')
        echo: bool | None = Field(
            False, description="true or false; true puts the prompt before the text")
        user: str | None = Field(
            None, max_length=MAX_NAME_LENGTH,
            description=f"a text of at most {MAX_NAME_LENGTH} characters, which is ignored")
        logprobs: int | None = number_field(
            int, None, 0, MAX_LOGPROBS, note="; how many of the likeliest tokens to name beside "
            "each token; not with stream")
        best_of: int | None = unsupported_field("the value of n")
        suffix: Literal[""] | None = unsupported_field("null")
        logit_bias: dict | None = unsupported_field("null", max_length=0)
        presence_penalty: float | None = unsupported_field(0, ge=0, le=0)
        frequency_penalty: float | None = unsupported_field(0, ge=0, le=0)

    return Completion


def request_models(prompt_limit, length_limit, capacity):
    """The bodies of /generate and /v1/completions, as pydantic models.

    The limits: characters or token ids in a prompt, new tokens, sequences in a request.
    """
    limits = prompt_limit, length_limit, capacity
    return generate_body(*limits), completion_body(*limits)


def parse_json(data):
    """The value of a body, bytes. Raises ApiError 400 if it is no JSON."""
    from pydantic_core import from_json
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ApiError(400, "the body begins with a byte order mark: expected UTF-8 without one")
    try:
        return from_json(data)
    except ValueError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}") from e


def parse_body(model, data):
    """The body of a request, bytes, as an instance of the pydantic model.

    Raises ApiError 400 that names the first field at fault and what is expected there. The first
    error counts: listing all errors of a megabyte of wrong JSON took seconds.
    """
    from pydantic import ValidationError
    values = parse_json(data)
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    for field, value in values.items():
        if field not in model.model_fields:
            known = ", ".join(model.model_fields)
            raise ApiError(400, f"unknown field {field[:50]!r}: expected {known}", field[:50])
        if isinstance(value, dict) and len(value) > MAX_ENTRIES:
            raise wrong_value(model, field, value)
    try:
        return model.model_validate(values)
    except ValidationError as e:
        field = str(e.errors(include_url=False, include_input=False)[0]["loc"][0])
    if field not in values:
        expected = model.model_fields[field].description
        raise ApiError(400, f"{field} is missing: expected {expected}", field)
    raise wrong_value(model, field, values[field])


def read_body(model):
    """The request's body as an instance of the pydantic model. Raises ApiError 400 and 415."""
    from flask import request
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"the body is compressed (Content-Encoding: {encoding[:50]}): "
                       "expected plain JSON")
    if request.mimetype != "application/json":
        raise ApiError(415, f"the content type is {request.mimetype[:50]!r}: "
                       "expected application/json")
    return parse_body(model, request.get_data(cache=False))


def wrong_value(model, field, value):
    """The ApiError for a field whose value is not as its description says."""
    found = json.dumps(value)
    if len(found) > 60:
        found = found[:57] + "..."
    expected = model.model_fields[field].description
    if not expected.startswith(UNSUPPORTED):
        expected = f"expected {expected}"
    return ApiError(400, f"{field} is {found}: {expected}", field)


def encode_prompt(tokenizer, text):
    """The token ids of a text; an empty one is <|endoftext|>, the start of a document.

    Raises ApiError 400 if the tokenizer cannot encode it.
    """
    try:
        return encode_text(tokenizer, text) or [tokenizer.eot_token]
    except UserError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from error


def split_prompts(prompt, limit):
    """The prompts of a completion: texts, or lists of token ids.

    prompt: a text, token ids, or a list of such; limit: the largest number of characters or ids
    in one. Raises ApiError 400 for an empty list and a long prompt.
    """
    is_token_ids = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    prompts = [prompt] if isinstance(prompt, str) or is_token_ids else prompt
    if not prompts or [] in prompts:
        message = "prompt is an empty list: expected a text, token ids, or a list of such"
        raise ApiError(400, message, "prompt")
    if any(len(one) > limit for one in prompts):
        message = f"a prompt in the list is too long: expected {describe_prompt(limit)}"
        raise ApiError(400, message, "prompt")
    return prompts


def encode_prompts(tokenizer, prompts):
    """Texts or lists of token ids as lists of token ids. Raises ApiError 400 for an unknown id."""
    largest = tokenizer.n_vocab - 1
    encoded = []
    for one in prompts:
        if isinstance(one, str):
            one = encode_prompt(tokenizer, one)
        elif min(one) < 0 or max(one) > largest:
            message = f"prompt has a token id out of range: expected 0 to {largest}"
            raise ApiError(400, message, "prompt")
        encoded.append(one)
    return encoded


def check_completion(model, body):
    """Raise ApiError 400 for fields of a completion that do not go together."""
    if body.best_of not in (None, body.n or 1):
        raise wrong_value(model, "best_of", body.best_of)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0: expected at least 1 without echo", "max_tokens")
    if body.logprobs is not None and body.stream:
        raise ApiError(400, "logprobs come with a whole answer, not with a stream: leave one of "
                       "them out", "logprobs")


def check_context(prompts, block_size):
    """Raise ApiError 400 for a prompt of which the model would not see all."""
    longest = max(map(len, prompts))
    if longest > block_size:
        raise ApiError(400, f"a prompt has {longest} tokens: expected at most {block_size}, the "
                       "context of the model, with logprobs", "prompt")


def check_echo(texts, n, limit):
    """Raise ApiError 400 if an answer would repeat too much: n copies of each of the texts.

    limit: characters that all copies but the first of each text may have together.
    """
    n_characters = (n - 1) * sum(map(len, texts))
    if n_characters > limit:
        raise ApiError(400, f"echo repeats {n_characters} characters of the prompts: expected at "
                       f"most {limit} beyond one copy of each; lower n", "echo")


# -----------------------------------------------------------------------------
# OpenAPI

POST_ANSWERS = {
    200: "JSON, or server-sent events if stream is true",
    400: "malformed or out of range",
    401: "API key missing or wrong",
    404: "no such model",
    413: "body too large",
    415: "not JSON",
    429: "queue full, or rate limit met: see Retry-After",
    500: "failed",
    503: "loading or draining",
    504: "not done in time",
}


def describe_post(summary, model):
    """The OpenAPI entry of a route that takes this body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    body = dict(required=True, content={"application/json": dict(schema=schema)})
    responses = {str(status): dict(description=text) for status, text in POST_ANSWERS.items()}
    return dict(post=dict(summary=summary, requestBody=body, responses=responses))


def describe_get(summary):
    """The OpenAPI entry of a route without a body."""
    return dict(get=dict(summary=summary, responses={"200": dict(description=summary)}))


def openapi(models):
    """The OpenAPI description: the bodies in full, the other routes by name."""
    from pydantic.json_schema import models_json_schema
    generate, completion = models
    _, schemas = models_json_schema([(model, "validation") for model in models],
                                    ref_template="#/components/schemas/{model}")
    paths = {
        "/generate": describe_post("Continue a text", generate),
        "/v1/completions": describe_post("OpenAI's completions", completion),
        "/v1/models": describe_get("The model"),
        "/health": describe_get(
            "State of the server; the model, its dtype and how it is quantized"),
        "/metrics": describe_get("Prometheus"),
    }
    key = dict(type="http", scheme="bearer")
    components = dict(schemas=schemas["$defs"], securitySchemes=dict(key=key))
    return dict(openapi="3.1.0", info=dict(title="GPT-2", version=VERSION),
                security=[{}, dict(key=[])], paths=paths, components=components)
