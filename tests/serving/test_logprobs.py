"""logprobs and echo of /v1/completions, as those who evaluate models ask for them.

    python -m pytest tests/serving/test_logprobs.py

The harness of EleutherAI reads choices[].logprobs.token_logprobs and top_logprobs from the length
of the context to the last but one.
"""

import random

import pytest
import serving_helpers as serving
import torch
from serving_helpers import CONFIG, in_background, run_server

from gptlib.data.tokenizer import tokenizer_to_dict
from gptlib.training.scoring import ending_losses
from train_gpt2 import GPT

model, home, server = serving.model, serving.home, serving.server
EOT = 256
HARNESS = dict(temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)


def random_ids(n, seed):
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(n)]


def expected_logprobs(model, tokens):
    """log-softmax of the logits that predict each token but the first, and those of the next."""
    return model(torch.tensor([tokens]))[0][0].log_softmax(-1)  # (T, vocab)


def check_choice(model, choice, tokens):
    """Compare a choice of a request like HARNESS with the model's own forward pass."""
    logprobs = choice["logprobs"]
    n = len(tokens)
    assert {len(values) for values in logprobs.values()} == {n + 1}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = expected_logprobs(model, tokens)
    for i in range(1, n):
        assert logprobs["token_logprobs"][i] == pytest.approx(
            expected[i - 1, tokens[i]].item(), abs=1e-4), i
    assert logprobs["token_logprobs"][n] == pytest.approx(expected[-1].max().item(), abs=1e-4)
    for i in range(1, n + 1):
        best = max(logprobs["top_logprobs"][i].values())
        token = tokens[i] if i < n else expected[-1].argmax().item()
        is_greedy = logprobs["token_logprobs"][i] == best
        assert is_greedy == (expected[i - 1].argmax().item() == token), i


def test_a_harness_reads_every_token_of_its_prompts(server, model):
    """Guards against a list that is one token short, shifted, or sampled under a temperature."""
    prompts = [random_ids(n, n) for n in (1, 2, 40, 63, 64)]
    answer = server.post("/v1/completions", prompt=prompts, **HARNESS).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4]
    for choice, tokens in zip(answer["choices"], prompts, strict=True):
        check_choice(model, choice, tokens)
    assert answer["usage"]["prompt_tokens"] == 170
    assert answer["usage"]["completion_tokens"] == 5
    hot = dict(HARNESS, temperature=2.0, top_k=1, top_p=0.1)
    again = server.post("/v1/completions", prompt=prompts, **hot).json()
    for choice, other in zip(answer["choices"], again["choices"], strict=True):
        assert choice["logprobs"] == other["logprobs"]


def test_sums_are_those_of_hellaswag(server, model):
    """Guards against sums that are shifted by one token: accuracy alone would hardly show it."""
    rows = []
    for i in range(2):  # eight sequences: all that the server takes at a time
        context = random_ids(10 + 13 * i, i)
        rows.append((context, [random_ids(5 + j, 10 * i + j) for j in range(4)]))
    asked = []
    for context, endings in rows:
        prompts = [context + ending for ending in endings]
        asked.append(in_background(server.post, "/v1/completions", prompt=prompts, **HARNESS))
    losses = ending_losses(model, rows)
    for (context, _), answer, expected in zip(rows, asked, losses, strict=True):
        for choice, ending in zip(answer.result().json()["choices"], expected, strict=True):
            own = choice["logprobs"]["token_logprobs"][len(context):-1]
            assert sum(own) == pytest.approx(-sum(ending), abs=1e-3)


def test_a_shared_beginning_is_read_all_the_same(server, model):
    """Guards against a prompt whose beginning is in the cache and has no log-probabilities then."""
    tokens = random_ids(60, 7)
    for _ in range(2):
        answer = server.post("/v1/completions", prompt=[tokens, tokens], n=2, **HARNESS).json()
        assert len(answer["choices"]) == 4
        for choice in answer["choices"]:
            check_choice(model, choice, tokens)


def test_texts_and_offsets_are_those_of_the_tokens(server):
    """Guards against offsets that count bytes, and a text that its tokens do not make up."""
    text = "aé b"
    wanted = dict(prompt=text, max_tokens=3, seed=1, logprobs=5)
    echoed = server.post("/v1/completions", echo=True, **wanted).json()["choices"][0]
    logprobs = echoed["logprobs"]
    assert logprobs["tokens"][0] == "a"
    assert logprobs["tokens"][3:5] == [" ", "b"]
    assert logprobs["text_offset"][:5] == [0, 1, 1, 2, 3]  # é is two tokens
    assert len(logprobs["tokens"]) == 5 + 3
    assert all(len(top) in (5, 6) for top in logprobs["top_logprobs"][5:])
    alone = server.post("/v1/completions", **wanted).json()["choices"][0]
    assert alone["text"] == echoed["text"].removeprefix(text)
    for name in ("tokens", "text_offset"):
        assert alone["logprobs"][name] == logprobs[name][5:]
    chosen_alone = server.post("/v1/completions", **dict(wanted, logprobs=0)).json()["choices"][0]
    assert [len(top) for top in chosen_alone["logprobs"]["top_logprobs"]] == [1, 1, 1]


def test_no_new_token_may_be_asked_for(server, model):
    """Guards against a client that scores a text, and cannot do so without a token of ours."""
    tokens = random_ids(20, 3)
    wanted = dict(HARNESS, max_tokens=0)
    answer = server.post("/v1/completions", prompt=tokens, **wanted).json()
    choice = answer["choices"][0]
    assert choice["text"] == bytes(tokens).decode()
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 20
    assert answer["usage"]["completion_tokens"] == 0
    streamed = server.post("/v1/completions", prompt="abc", echo=True, max_tokens=0, stream=True)
    pieces = [event["choices"][0]["text"] for event in serving.events(streamed)]
    assert "".join(pieces) == "abc"


@pytest.mark.parametrize("body, message", [
    (dict(prompt=[1] * 65), "a prompt has 65 tokens: expected at most 64, the context"),
    (dict(prompt=["a", "b" * 65]), "a prompt has 65 tokens"),
    (dict(prompt="a", stream=True), "logprobs come with a whole answer, not with a stream"),
    (dict(prompt="a", logprobs=6), "logprobs is 6: expected a whole number from 0 to 5"),
    (dict(prompt="a", max_tokens=0, echo=False), "max_tokens is 0: expected at least 1"),
])
def test_what_cannot_be_told_is_refused(server, body, message):
    """Guards against a prompt that is cut in silence, whose log-probabilities belong elsewhere."""
    answer = server.post("/v1/completions", **{**HARNESS, **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_many_stop_texts_are_taken(server):
    """Guards against a harness whose tasks have more than OpenAI's four."""
    stops = [f"never {i}" for i in range(20)]
    assert server.post("/v1/completions", prompt="abc", max_tokens=3, stop=stops).ok


def test_fields_that_change_nothing_are_accepted(server):
    """Guards against clients that send every field with its default."""
    neutral = dict(best_of=2, n=2, suffix="", logit_bias={}, presence_penalty=0,
                   frequency_penalty=0.0, logprobs=None, user="me",
                   stream_options=dict(include_obfuscation=False))
    assert server.post("/v1/completions", prompt="abc", max_tokens=3, **neutral).ok


def test_the_end_of_the_text_has_its_entry(home, model):
    """Guards against an ending that silently loses its last token, for a model that always ends."""
    always = GPT(CONFIG)
    always.load_state_dict(model.state_dict())
    with torch.no_grad():
        always.transformer.wte.weight[EOT] = 0.1
        always.transformer.ln_f.weight.zero_()
        always.transformer.ln_f.bias.fill_(5.0)
        always.transformer.wte.weight[:EOT].clamp_(max=0.05)
    contents = dict(model=always.state_dict(), config=vars(CONFIG),
                    tokenizer=tokenizer_to_dict(model.tokenizer))
    torch.save(contents, home / "log" / "always.pt")
    with run_server(home, MODEL_CHECKPOINT="log/always.pt") as server:
        server.ready()
        tokens = random_ids(12, 5)
        choice = server.post("/v1/completions", prompt=tokens, **HARNESS).json()["choices"][0]
        check_choice(always, choice, tokens)
        assert choice["text"] == bytes(tokens).decode()
        assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>"
        assert choice["finish_reason"] == "stop"
