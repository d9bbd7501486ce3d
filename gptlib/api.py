"""What requests look like and what answers them: bodies, errors, the OpenAPI description."""

import json
from typing import Annotated, Literal


VERSION = "1.0.0"


class ApiError(Exception):
    """What a client is told in the place of an answer."""

    def __init__(self, status, message, field=None, code=None, retry_after=None):
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry_after = status, message, field, code, retry_after

    def body(self):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return dict(error=dict(message=self.message, type=kind, param=self.field, code=self.code))


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
