"""A tiny model over bytes, its tokenizer, and what the tests of the engine compare with."""

import random

import torch

from gptlib.data.tokenizer import make_encoding
from train_gpt2 import GPT, GPTConfig

CONFIG = GPTConfig(block_size=24, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
N_VOCAB = 257  # a token a byte, then <|endoftext|>; later rows of the embedding are padding
EOT = 256


def make_tokenizer():
    return make_encoding("bpe", {bytes([i]): i for i in range(256)})


def make_model(tokenizer=None):
    """A model with random weights, to the last bias.

    Its padded ids are so likely that only an engine that forbids them avoids them.
    """
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for name, p in model.named_parameters():
        is_norm_weight = "ln_" in name and "weight" in name
        torch.nn.init.normal_(p, mean=float(is_norm_weight), std=0.6 if p.dim() == 2 else 0.1)
    with torch.no_grad():
        wte = model.transformer.wte.weight
        wte /= wte.norm(dim=1, keepdim=True)  # else one token is the likeliest everywhere
        wte[N_VOCAB:] *= 5
    model.tokenizer = tokenizer
    return model.eval().requires_grad_(False)


def copy_of(model, config=CONFIG):
    """Another model with equal weights."""
    twin = GPT(config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def prompts(*lengths):
    """A prompt of random bytes for each length, the same at every call."""
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def uncached(model, prompt, n):
    """The greedy continuation by whole forward passes.

    The oldest half of the context is dropped when it is full, as the engine does.
    """
    tokens, start = list(prompt), max(0, len(prompt) - CONFIG.block_size)
    while len(tokens) < len(prompt) + n:
        if len(tokens) - start > CONFIG.block_size:
            start += CONFIG.block_size // 2
        logits, _ = model(torch.tensor([tokens[start:]]))
        tokens.append(logits[0, -1, :N_VOCAB].argmax().item())
    return tokens[len(prompt):]


def as_text(tokens):
    return bytes(tokens).decode(errors="replace")


def drain(engine):
    """Run an engine until it is idle."""
    while engine.step():
        pass


def events_of(request):
    """All events of a request that has ended, without the None at the end."""
    return list(iter(lambda: request.events.get(timeout=1), None))
