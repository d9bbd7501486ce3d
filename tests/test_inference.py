"""The engine against the uncached model, the text layer, and the command as its user sees it.

    python -m pytest tests/test_inference.py
"""

import dataclasses
import os
import random
import subprocess
import threading

import pytest
import tiktoken
import torch
from conftest import command, environment, run

import inference
from gptlib.common import UserError
from gptlib.tokenizer import make_encoding, tokenizer_to_dict
from gptlib.engine import Engine, TextStream
from gptlib.packing import pack
from inference import generate_text, load_model_from_checkpoint
from gptlib.sampling import sample_next
from train_gpt2 import GPT, GPTConfig
from gptlib.packing import can_pack

CONFIG = GPTConfig(block_size=24, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
N_VOCAB = 257  # a token a byte, then <|endoftext|>; the rows of the embedding from there on are padding
EOT = 256


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return make_encoding("bpe", {bytes([i]): i for i in range(256)})


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random to the last bias, and in love with its padding: only an engine that forbids it does not draw from there."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("ln_" in name and "weight" in name), std=0.6 if p.dim() == 2 else 0.1)
    with torch.no_grad():
        wte = model.transformer.wte.weight
        wte /= wte.norm(dim=1, keepdim=True)  # no token is the likeliest everywhere: greedy text is not one letter
        model.transformer.wte.weight[N_VOCAB:] *= 5
    model.tokenizer = tokenizer
    return model.eval().requires_grad_(False)


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "latest_checkpoint.pt"
    torch.save(dict(model=model.state_dict(), config=dataclasses.asdict(CONFIG), tokenizer=tokenizer_to_dict(tokenizer),
                    train_config=dict(sample_prompt="def "), step=7), path)
    return path


def prompts(*lengths):
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


def uncached(model, prompt, n):
    """Greedy continuation by whole forward passes; the oldest half of the context goes when it is full."""
    tokens, start = list(prompt), max(0, len(prompt) - CONFIG.block_size)
    while len(tokens) < len(prompt) + n:
        if len(tokens) - start > CONFIG.block_size:
            start += CONFIG.block_size // 2
        logits, _ = model(torch.tensor([tokens[start:]]))
        tokens.append(logits[0, -1, :N_VOCAB].argmax().item())
    return tokens[len(prompt):]


def drain(engine):
    while engine.step():
        pass


# -----------------------------------------------------------------------------
# the engine


@pytest.mark.parametrize("length", [1, 5, 23, 24, 25, 60])
@pytest.mark.parametrize("lag", [0, 1])  # 1 is what a GPU does: look at a token when the next is under way
def test_greedy_alone_equals_the_uncached_model_beyond_the_contexts_end(model, length, lag):
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    engine.lag = lag
    prompt, = prompts(length)
    request = engine.submit(prompt, max_length=70, temperature=0)
    drain(engine)
    assert request.tokens == uncached(model, prompt, 70)
    assert request.finish_reason == "length"


@pytest.mark.parametrize("lag", [0, 1])
def test_greedy_among_others_that_come_and_go_equals_the_uncached_model(model, lag):
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    engine.lag = lag
    rng = random.Random(0)
    greedy, others = [], []
    for i, prompt in enumerate(prompts(*[1, 23, 24, 25, 60, 7] * 3)):
        greedy.append((prompt, engine.submit(prompt, max_length=rng.randrange(1, 60), temperature=0)))
        others.append(engine.submit(prompts(9)[0], max_length=rng.randrange(1, 40), top_k=rng.choice([None, 5])))
        for _ in range(rng.randrange(12)):
            engine.step()
        if i % 3 == 0:
            others[-1].cancel()
    drain(engine)
    for prompt, request in greedy:
        assert request.tokens == uncached(model, prompt, request.max_length)
    assert {r.finish_reason for r in others} == {"length", "cancelled"}


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_contexts_work(block_size):
    model = GPT(dataclasses.replace(CONFIG, block_size=block_size)).eval()
    engine = Engine(model, slots=2)
    requests = [engine.submit([3], max_length=9), engine.submit([4, 5, 6, 7], max_length=9)]
    drain(engine)
    assert [len(r.tokens) for r in requests] == [9, 9]


@pytest.mark.parametrize("settings", [{}, dict(top_k=5), dict(top_p=0.9), dict(temperature=0.7, top_k=50, top_p=0.8)])
def test_a_seed_gives_the_same_sample_alone_and_among_neighbours(model, settings):
    def sample(slots, crowd):
        engine = Engine(model, slots, n_vocab=N_VOCAB)
        for i in range(crowd):
            engine.submit(prompts(3 + i)[0], max_length=10 + 3 * i, temperature=0.5 + i % 3, seed=i)
        engine.step()
        request = engine.submit(prompts(6)[0], max_length=40, seed=1234, **settings)
        for i in range(crowd):
            engine.submit(prompts(6)[0], max_length=20, seed=i)
        drain(engine)
        return request.tokens

    alone = sample(1, 0)
    assert sample(4, 1) == alone
    assert sample(3, 5) == alone
    assert len(set(alone)) > 3


def test_different_seeds_differ_and_a_seed_that_was_chosen_repeats_the_sample(model):
    engine = Engine(model, slots=4, n_vocab=N_VOCAB)
    first = [engine.submit([1], max_length=20) for _ in range(3)]
    drain(engine)
    assert len({tuple(r.tokens) for r in first}) == 3
    again = engine.submit([1], max_length=20, seed=first[1].seed)
    drain(engine)
    assert again.tokens == first[1].tokens


def test_draws_have_the_frequencies_of_the_models_probabilities(model):
    engine = Engine(model, slots=50, n_vocab=N_VOCAB)
    requests = [engine.submit([65, 66], max_length=1, seed=i) for i in range(3000)]
    drain(engine)
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in requests]), minlength=N_VOCAB) / 3000
    expected = model(torch.tensor([[65, 66]]))[0][0, -1, :N_VOCAB].softmax(-1)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)


def test_top_k_and_top_p_keep_what_their_definitions_say():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))

    def reachable(**how):
        noise = torch.linspace(0, 1, 101)[:, None]  # from 0 to 1, both ends included
        return set(sample_next(logits.expand(101, 4), noise=noise, **how)[:, 0].tolist())

    assert reachable() == {0, 1, 2, 3}
    assert reachable(top_k=1) == {1}
    assert reachable(top_k=2) == {1, 3}
    assert reachable(top_k=9) == {0, 1, 2, 3}
    assert reachable(top_p=0.4) == {1}  # the likeliest always stays
    assert reachable(top_p=0.74) == {1, 3}
    assert reachable(top_p=0.76) == {1, 2, 3}
    assert reachable(top_p=1.0) == {0, 1, 2, 3}
    assert reachable(top_k=2, top_p=0.6) == {1}  # of the two, 1 has two thirds
    assert reachable(top_p=0.76, temperature=0.5) == {1, 3}  # squares: 0.25 and 0.0625 of 0.345


def test_padded_ids_never_come_out(model):
    request_tokens = []
    for how in (dict(temperature=0), dict(), dict(top_k=20), dict(top_p=0.5), dict(temperature=5.0)):
        engine = Engine(model, slots=2, n_vocab=N_VOCAB)
        requests = [engine.submit([i], max_length=60, **how) for i in range(4)]
        drain(engine)
        request_tokens += [t for r in requests for t in r.tokens]
    assert max(request_tokens) < N_VOCAB
    assert model(torch.tensor([[1, 2, 3]]))[0][0, -1].argmax() >= N_VOCAB  # it would have


@pytest.mark.parametrize("lag", [0, 1])
def test_the_stop_token_ends_a_sequence_and_is_not_part_of_it(model, lag):
    expected = uncached(model, [7], 30)
    stop = next(t for i, t in enumerate(expected) if i > 2 and t not in expected[:i])
    engine = Engine(model, slots=2, n_vocab=N_VOCAB, stop_token=stop)
    engine.lag = lag
    request = engine.submit([7], max_length=30, temperature=0)
    follower = engine.submit([7, 8], max_length=5)
    drain(engine)
    assert request.tokens == expected[:expected.index(stop)]
    assert request.finish_reason == "stop" and follower.finish_reason in ("length", "stop")


def test_cancelling_frees_the_slot_before_the_next_token(model):
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    first, second = engine.submit([1], max_length=10**6), engine.submit([2], max_length=3)
    third = engine.submit([3], max_length=3)
    for _ in range(5):
        engine.step()
    assert len(first.tokens) == 6 and not second.tokens
    first.cancel()
    third.cancel()
    engine.step()
    assert len(first.tokens) == 6 and second.tokens
    drain(engine)
    assert (first.finish_reason, second.finish_reason, third.finish_reason) == ("cancelled", "length", "cancelled")
    for request in (first, second, third):
        events = [request.events.get(timeout=1) for _ in range(len(request.tokens) + 1)]
        assert events == [*request.tokens, None] and request.events.empty()


POISON = 99  # a token that no forward pass survives


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("where", ["prefill", "decode", "slide"])
def test_a_sequence_that_fails_ends_with_its_error_and_its_neighbours_do_not_notice(model, monkeypatch, where, lag):
    hidden = GPT.hidden
    failing = False

    def fragile(self, idx, cache=None, pos=None):
        if POISON in idx and {"prefill": pos is None, "decode": pos is not None, "slide": failing and pos is None}[where]:
            raise RuntimeError("no memory left for this one")
        return hidden(self, idx, cache, pos)

    good = [p for p in prompts(5, 20, 9, 24) if POISON not in p]
    expected = [uncached(model, p, 40) for p in good]
    assert not any(POISON in p + e for p, e in zip(good, expected, strict=True))
    monkeypatch.setattr(GPT, "hidden", fragile)
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    engine.lag = lag
    requests = [engine.submit(p, max_length=40, temperature=0) for p in good[:2]]
    poisoned = engine.submit([1, 2, 3] if where == "decode" else [1] * 15 + [POISON], max_length=40, temperature=0)
    requests += [engine.submit(p, max_length=40, temperature=0) for p in good[2:]]
    for i in range(300):
        failing = where == "slide" and i > 2
        if where == "decode" and i == 3:
            engine.new[engine.live.index(poisoned)] = POISON
        if not engine.step():
            break
    assert poisoned.finish_reason == "error" and "no memory" in str(poisoned.error)
    assert list(iter(lambda: poisoned.events.get(timeout=1), None)) == poisoned.tokens
    assert [r.tokens for r in requests] == expected
    assert not engine.live and not engine.waiting and not engine.pending


@pytest.mark.parametrize("lag", [0, 1])
def test_after_abort_those_who_wait_are_served(model, monkeypatch, lag):
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)
    engine.lag = lag
    requests = [engine.submit([i + 1], max_length=10, temperature=0) for i in range(3)]
    for _ in range(3):
        engine.step()
    engine.abort(RuntimeError("the device is gone"))
    assert [r.finish_reason for r in requests] == ["error", "error", None]
    drain(engine)
    assert requests[2].tokens == uncached(model, [3], 10)
    assert all(r.events.get(timeout=1) is not None for r in requests)


def test_a_request_cancelled_while_it_waits_leaves_the_queue_at_the_next_token(model):
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    first, second, third = (engine.submit([i], max_length=20) for i in range(3))
    engine.step()
    second.cancel()
    engine.step()
    assert list(engine.waiting) == [third] and second.events.get(timeout=1) is None and not first.ended


def test_the_least_temperatures_are_greedy(model):
    engine = Engine(model, slots=2, n_vocab=N_VOCAB)
    requests = [engine.submit([7], max_length=20, temperature=t) for t in (0, 1e-39, 1e-300)]
    drain(engine)
    assert [r.tokens for r in requests] == [uncached(model, [7], 20)] * 3


def test_one_forward_pass_a_token_and_one_a_prompt(model, monkeypatch):
    shapes = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *a: shapes.append(tuple(idx.shape)) or hidden(self, idx, *a))
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    for _ in range(3):
        engine.submit([1, 2, 3, 4, 5], max_length=5)
    drain(engine)
    assert shapes == [(1, 5)] + [(3, 1)] * 4


def test_requests_from_other_threads_are_served_by_one(model):
    engine = Engine(model, slots=3, n_vocab=N_VOCAB)
    results, closing = {}, threading.Event()

    def ask(i):
        request = engine.submit([i + 1], max_length=20, seed=i)
        results[i] = list(iter(request.events.get, None)) == request.tokens and request.tokens

    def work():
        while not closing.is_set():
            engine.step()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    worker = threading.Thread(target=work)
    for t in [*threads, worker]:
        t.start()
    for t in threads:
        t.join(30)
    closing.set()
    worker.join(30)
    alone = Engine(model, slots=1, n_vocab=N_VOCAB)
    for i in range(12):
        request = alone.submit([i + 1], max_length=20, seed=i)
        drain(alone)
        assert results[i] == request.tokens


def test_packed_bfloat16_weights_are_the_same_function(model):
    if not can_pack(torch.bfloat16):
        pytest.skip("this CPU or this torch has no bfloat16 kernels of oneDNN")
    half = GPT(CONFIG)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).eval()
    idx = torch.tensor(prompts(24, 24))
    expected, found = half(idx)[0].float(), pack(half)(idx)[0].float()
    torch.testing.assert_close(found, expected, atol=0.05 * expected.std().item(), rtol=0.05)


def test_bfloat16_greedy_follows_the_float32_model_where_that_is_sure(model):
    half = GPT(CONFIG)
    half.load_state_dict(model.state_dict())
    engine = Engine(half.to(torch.bfloat16).eval(), slots=2, n_vocab=N_VOCAB)
    requests = [engine.submit(p, max_length=40, temperature=0) for p in prompts(5, 20)]
    drain(engine)
    for request in requests:
        tokens = request.prompt + request.tokens
        for i in range(len(request.prompt), CONFIG.block_size):
            logits = model(torch.tensor([tokens[:i]]))[0][0, -1, :N_VOCAB]
            assert logits.max() - logits[tokens[i]] < 0.1 * logits.std()


def test_the_compiled_step_gives_the_same_tokens_and_each_engine_has_its_own_weights(model, capsys):
    other = GPT(CONFIG)
    other.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()})
    other.eval()
    for m in (model, other):
        engine = Engine(m, slots=2, n_vocab=N_VOCAB, compile=True)
        if engine.compiled is None:
            pytest.skip(capsys.readouterr().err)
        engine.warm_up()
        requests = [engine.submit(p, max_length=30, temperature=0) for p in prompts(5, 24, 1)]
        drain(engine)
        for request in requests:
            assert request.tokens == uncached(m, request.prompt, 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_gives_the_same_tokens_through_its_graphs(model):
    twin = GPT(CONFIG)
    twin.load_state_dict(model.state_dict())
    engine = Engine(twin.to("cuda").eval(), slots=3, n_vocab=N_VOCAB)
    requests = [engine.submit(p, max_length=50, temperature=0) for p in prompts(5, 24, 1, 60, 9)]
    drain(engine)
    for request in requests:
        assert request.tokens == uncached(model, request.prompt, 50)
    assert engine.graphs


# -----------------------------------------------------------------------------
# text


class Script:
    """In the place of an engine: a request whose tokens are already there."""

    def __init__(self, tokens):
        self.engine = Engine(GPT(CONFIG), slots=1)
        self.request = self.engine.submit([1])
        for token in tokens:
            self.request.events.put(token)
        self.request.finish_reason = "length"
        self.request.events.put(None)


def pieces(text, tokenizer, stop=()):
    stream = TextStream(Script(text if isinstance(text, bytes) else text.encode()).request, tokenizer, stop)
    return list(stream), stream


def test_characters_of_several_bytes_are_never_split(tokenizer):
    text = "naïve 日本語 🙂 e\u0301"
    found, stream = pieces(text, tokenizer)
    assert found == list(text) and stream.text == text and stream.n_tokens == len(text.encode())


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer):
    assert "".join(pieces(b"a\xffb\xe6\x97", tokenizer)[0]) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("text, stop, expected", [
    ("one END two", ["END"], "one "),
    ("one EN two", ["END"], "one EN two"),  # what was held back comes after all
    ("one EN", ["END"], "one EN"),
    ("EENDS", ["END"], "E"),
    ("aab", ["aab", "ab"], ""),
    ("ababac!", ["abac"], "ab"),
    ("日本語", ["本"], "日"),
    ("one two", ["two", "one"], ""),  # the earliest in the text, not in the list
])
def test_stop_strings_end_the_text_and_are_not_in_it(tokenizer, text, stop, expected):
    found, stream = pieces(text, tokenizer, stop)
    assert "".join(found) == stream.text == expected
    assert stream.request.finish_reason == ("stop" if expected != text else "length")


def test_a_stop_string_cancels_the_request(model, tokenizer):
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    expected = bytes(uncached(model, [65], 40)).decode(errors="replace")
    engine_request = engine.submit([65], max_length=10**6, temperature=0)
    stream = TextStream(engine_request, tokenizer, [expected[9:12]], engine.step)
    assert "".join(stream) == expected[:expected.find(expected[9:12])]
    assert engine_request.finish_reason == "stop"
    assert not engine.step() and not engine.live


def test_generate_text_begins_with_the_prompt_and_repeats_by_seed(model):
    one = generate_text(model, prompt="abc", max_length=20, temperature=0.8, top_k=50, seed=5)
    assert one.startswith("abc") and len(one) > 3
    several = generate_text(model, "abc", 20, 0.8, 50, seed=5, num_samples=3)
    assert several[0] == one and len(set(several)) == 3
    greedy = generate_text(model, "abc", max_length=20, temperature=0)
    assert greedy == "abc" + bytes(uncached(model, b"abc", 20)).decode(errors="replace")


def test_an_empty_prompt_is_the_beginning_of_a_document(model):
    assert generate_text(model, "", 20, temperature=0) == bytes(uncached(model, [EOT], 20)).decode(errors="replace")


def test_a_model_without_a_tokenizer_speaks_gpt2(monkeypatch, model, tokenizer):
    monkeypatch.setattr(inference, "load_tokenizer", lambda spec: {"gpt2": tokenizer}[spec])
    assert generate_text(GPT(CONFIG).eval(), "ab", 3).startswith("ab")


def test_dropout_is_for_training(model, tokenizer):
    twin = GPT(dataclasses.replace(CONFIG, dropout=0.5)).train()
    twin.load_state_dict(model.state_dict())
    twin.tokenizer = tokenizer
    assert generate_text(twin, "abc", 20, temperature=0) == generate_text(model, "abc", 20, temperature=0)


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1.0), "temperature is -1.0: expected 0 (greedy) or above"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_k=0), "top_k is 0: expected a whole number of at least 1"),
    (dict(top_k=True), "top_k is True"),
    (dict(top_p=0), "top_p is 0: expected a number above 0 and up to 1"),
    (dict(max_length=0), "max_length is 0"),
    (dict(max_length=2.5), "max_length is 2.5"),
    (dict(seed=-1), "seed is -1"),
])
def test_settings_out_of_range_are_named(model, settings, message):
    with pytest.raises(UserError) as error:
        generate_text(model, "a", **settings)
    assert message in str(error.value)


# -----------------------------------------------------------------------------
# checkpoints


def test_checkpoints_of_all_kinds_give_the_same_model(model, checkpoint, tmp_path, monkeypatch):
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(inference, "load_tokenizer", lambda spec: gpt2)
    idx = torch.tensor(prompts(20))
    expected = model(idx)[0]
    state, config = model.state_dict(), dataclasses.asdict(CONFIG)
    plain = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=320, bias=True, dropout=0.1)
    variants = {
        "ours": dict(model=state, config=config, optimizer=[{"state": {}}]),
        "compiled": dict(model={"_orig_mod." + k: v for k, v in state.items()}, config=config),
        "ddp": dict(model={"module." + k: v for k, v in state.items()}, config=config),
        "build-nanogpt": dict(model=state, config=CONFIG, step=3, val_loss=1.0),
        "nanogpt": dict(model={"_orig_mod." + k: v for k, v in state.items()}, model_args=plain, iter_num=1),
    }
    for name, contents in variants.items():
        torch.save(contents, tmp_path / name)
        loaded = load_model_from_checkpoint(tmp_path / name, device="cpu", dtype="float32")
        assert not loaded.training and loaded.tokenizer is gpt2
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        # nanoGPT has the exact GELU, the others its approximation
        torch.testing.assert_close(loaded(idx)[0], expected, atol=0.05 if name == "nanogpt" else 1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "hf")
    loaded = load_model_from_checkpoint(tmp_path / "hf", "cpu", torch.float32)
    torch.testing.assert_close(loaded(idx)[0], expected[..., :N_VOCAB])


def test_the_model_has_the_dtype_that_is_asked_for(checkpoint):
    assert load_model_from_checkpoint(checkpoint, "cpu", "bfloat16").lm_head.weight.dtype == torch.bfloat16
    assert load_model_from_checkpoint(checkpoint, "cpu", torch.float32).transformer.h[1].ln_1.bias.dtype == torch.float32


# -----------------------------------------------------------------------------
# the command


SAMPLE = ("inference.py", "--seed=3", "--max_length=20", "--device=cpu", "--dtype=float32")


def test_the_command_writes_text_to_stdout_and_the_rest_to_stderr(checkpoint, tmp_path, model):
    result = run(*SAMPLE, cwd=tmp_path)
    expected = generate_text(model, "def ", 20, 0.8, 50, seed=3)
    assert result.stdout == expected + "\n", result.stderr
    assert "20 tokens in " in result.stderr and "tokens/s; seed 3" in result.stderr
    three = run(*SAMPLE, "--num_samples=3", "--prompt=é", cwd=tmp_path).stdout
    assert three == "\n---\n".join(generate_text(model, "é", 20, 0.8, 50, seed=3, num_samples=3)) + "\n"


def test_prompts_from_a_file_and_from_another_program(checkpoint, tmp_path, model):
    (tmp_path / "story.txt").write_bytes("one\r\ntwo é".encode())
    expected = generate_text(model, "one\r\ntwo é", 20, 0, stop=["zq"]) + "\n"
    args = [*SAMPLE, "--temperature=0", "--stop", "zq"]
    for prompt, stdin in (("FILE:story.txt", b""), ("-", (tmp_path / "story.txt").read_bytes())):
        result = subprocess.run(command(*args, "--prompt", prompt), cwd=tmp_path, env=environment(), input=stdin,
                                capture_output=True, timeout=60)
        assert result.stdout.decode() == expected


def test_a_reader_that_has_seen_enough_is_no_error(checkpoint, tmp_path):
    line = " ".join(command("inference.py", "--max_length=3000", "--device=cpu"))
    result = subprocess.run(f"{line} | head -c 5", shell=True, cwd=tmp_path, env=environment(), capture_output=True,
                            timeout=60)
    assert result.stdout[:4] == b"def " and not result.stderr


@pytest.mark.parametrize("args, message", [
    (["--checkpoint_path=log/model_00009.pt"], "no checkpoint 'log/model_00009.pt'; checkpoints beside it: "
     "log/model_00003.pt"),
    (["--checkpoint_path=log/torn.pt"], "'log/torn.pt' is no checkpoint that can be read"),
    (["--checkpoint_path=log/other.pt"], "'log/other.pt' is no checkpoint of a GPT: it has no model and no config"),
    (["--temperature=-0.5"], "temperature is -0.5: expected 0 (greedy) or above"),
    (["--top_k=0"], "top_k is 0: expected a whole number of at least 1"),
    (["--num_samples=0"], "num_samples is 0"),
    (["--prompt=FILE:nothing.txt"], "--prompt FILE:nothing.txt: No such file or directory"),
    (["--device=tpu9"], "--device is 'tpu9'"),
])
def test_mistakes_get_one_line(checkpoint, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    os.link(checkpoint, tmp_path / "log" / "model_00003.pt")
    (tmp_path / "log" / "torn.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"weights": 1}, tmp_path / "log" / "other.pt")
    monkeypatch.setattr("sys.argv", ["inference.py", *args])
    with pytest.raises(UserError) as error:
        inference.main()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_longer_than_the_context_is_cut_and_that_is_said(checkpoint, tmp_path):
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    result = run(*SAMPLE, "--prompt", text, cwd=tmp_path)
    assert result.stdout.startswith(text)
    assert "the prompt has 36 tokens, the context 24: the first 12 are left out, it begins at 'mnop" in result.stderr


def test_a_missing_checkpoint_ends_the_process_without_a_traceback(tmp_path):
    result = run("inference.py", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: no checkpoint 'log/latest_checkpoint.pt'; checkpoints beside it: none\n"


def test_sampling_imports_nothing_it_does_not_need(checkpoint, tmp_path):
    code = ("import sys; import torch; before = set(sys.modules); import inference; sys.argv = ['inference.py', "
            "'--device=cpu', '--max_length=3']; inference.main(); print(*(set(sys.modules) - before), file=sys.stderr)")
    result = subprocess.run([os.sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=60,
                            env={**environment(), "PYTHONPATH": str(inference.__file__.rsplit("/", 1)[0])})
    loaded = set(result.stderr.splitlines()[-1].split())
    assert "inference" in loaded
    assert not loaded & {"datasets", "transformers", "tokenizers", "matplotlib", "pyarrow", "torch._dynamo", "flask"}
