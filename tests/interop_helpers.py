"""What the tests of other programs' models share: transformers' own GPT-2, tokenizers, and a text
in Chinese."""

import dataclasses
import random
import sys

import torch
import transformers

import hellaswag
import train_gpt2
from gptlib.data.tokenizer import tokenizer_to_dict, train_bpe
from train_gpt2 import GPT, GPTConfig

# the words of the Chinese corpus
WHO = "爷爷 奶奶 小明 姐姐 老师 邻居家的孩子 卖豆腐的师傅 画家 渔夫 我们".split()
WHEN = "清晨 傍晚 下雪的时候 春天来了， 每个星期天 昨天夜里 中秋节那天 雨停以后".split()
WHERE = "在河边 在村口的大树下 在图书馆里 在山上的茶园 在厨房 在安静的院子里 沿着长长的石板路 在海边".split()
WHAT = ("慢慢地散步 给大家讲故事 写了一封很长的信 唱起了从前的歌 "
        "看着月亮喝茶 种了三棵苹果树 画了一只鸟 等朋友回来").split()


def chinese(n, seed=0):
    """n sentences, some of them with a number, a Latin word or an emoji."""
    rng = random.Random(seed)
    for _ in range(n):
        end = rng.choice(["。", "。", "！", "……", f"，一共{rng.randrange(1000)}次。", " OK 🙂。\n"])
        yield rng.choice(WHEN) + rng.choice(WHO) + rng.choice(WHERE) + rng.choice(WHAT) + end


def train_mixed_bpe():
    """A small BPE of English, Python, Chinese and characters of several bytes."""
    odd = "ひらがなとカタカナー、naïve 🙂🙂 e\u0301" * 20
    return train_bpe([(train_gpt2.__doc__ + hellaswag.__doc__) * 3, "".join(chinese(300)), odd], 700)


def write_checkpoint(tokenizer, path):
    """A checkpoint file of a small model with this tokenizer; returns its path."""
    model = GPT(GPTConfig(32, 704, 2, 2, 32))
    config = dataclasses.asdict(model.config)
    torch.save(dict(model=model.state_dict(), config=config, tokenizer=tokenizer_to_dict(tokenizer)), path)
    return path


def hugging_face(n_vocab=300, gelu="gelu_new", bias=True, block_size=32, n_layer=2, n_head=2, n_embd=32, seed=0,
                 **options):
    """transformers' own GPT-2, random to the last bias."""
    torch.manual_seed(seed)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=n_vocab, n_positions=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
        activation_function=gelu, bos_token_id=None, eos_token_id=None, **options))
    for name, p in hf.named_parameters():
        torch.nn.init.normal_(p, mean=float("ln_" in name and "weight" in name), std=0.3 if p.dim() == 2 else 0.1)
        if name.endswith("bias") and not bias:
            torch.nn.init.zeros_(p)
    return hf.eval().requires_grad_(False)


def greedy(logits_of, idx, n, n_vocab):
    """Continue a list of tokens by n, one whole forward pass each."""
    for _ in range(n):
        idx = [*idx, logits_of(torch.tensor([idx]))[0, -1, :n_vocab].argmax().item()]
    return idx


def main_of(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()
