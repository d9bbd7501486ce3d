"""What the tests of checkpoints share: small checkpoints of each kind, transformers' own GPT-2,
tokenizers, and a text in Chinese."""

import dataclasses
import random
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import hellaswag
import train_gpt2
from gptlib.checkpoints.sharded_tensors import DirectoryWriter
from gptlib.data.tokenizer import tokenizer_to_dict, train_bpe
from train_gpt2 import GPT, GPTConfig

# the words of the Chinese corpus
WHO = "爷爷 奶奶 小明 姐姐 老师 邻居家的孩子 卖豆腐的师傅 画家 渔夫 我们".split()
WHEN = "清晨 傍晚 下雪的时候 春天来了， 每个星期天 昨天夜里 中秋节那天 雨停以后".split()
WHERE = ("在河边 在村口的大树下 在图书馆里 在山上的茶园 在厨房 "
         "在安静的院子里 沿着长长的石板路 在海边").split()
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
    docstrings = train_gpt2.__doc__ + hellaswag.__doc__
    return train_bpe([docstrings * 3, "".join(chinese(300)), odd], 700)


SIZES = dict(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=8)


def training_state(step=3):
    """A small checkpoint with all that a run saves."""
    torch.manual_seed(step)
    model = GPT(GPTConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(61, (2, 8)), torch.randint(61, (2, 8)))[1].backward()
    optimizer.step()
    return dict(
        version=1, model=model.state_dict(), config=dataclasses.asdict(model.config),
        optimizer=[optimizer.state_dict()], scaler={}, rng=[{"cpu": torch.get_rng_state()}],
        train_config={**SIZES, "preset": "demo", "max_steps": 60}, tokenizer={"name": "gpt2"},
        step=step, position=step * 16, val_loss=2.5, val_step=step)


def assert_same_nest(ours, theirs, path="checkpoint"):
    """Equal structure, and tensors equal bit for bit."""
    if torch.is_tensor(theirs):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), path
        for key in theirs:
            assert_same_nest(ours[key], theirs[key], f"{path}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), path
        for i, value in enumerate(theirs):
            assert_same_nest(ours[i], value, f"{path}[{i}]")
    else:
        assert ours == theirs, path


def write_checkpoint(tokenizer, path):
    """A checkpoint file of a small model with this tokenizer; returns its path."""
    model = GPT(GPTConfig(32, 704, 2, 2, 32))
    config = dataclasses.asdict(model.config)
    torch.save(dict(model=model.state_dict(), config=config,
                    tokenizer=tokenizer_to_dict(tokenizer)), path)
    return path


def write_checkpoint_directory(path, state):
    """The state as a checkpoint directory, the model's tensors sharded over one process; returns
    its path."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = {}  # by address: the head and the embedding are one tensor
        for tensor in state["model"].values():
            if tensor.data_ptr() not in sharded:
                sharded[tensor.data_ptr()] = distribute_tensor(tensor, mesh, [Shard(0)])
        model = {name: sharded[tensor.data_ptr()] for name, tensor in state["model"].items()}
        writer = DirectoryWriter(path, {**state, "model": model}, dist.group.WORLD)
        return writer.finish(lambda: None)
    finally:
        dist.destroy_process_group()


def hugging_face(n_vocab=300, gelu="gelu_new", bias=True, block_size=32, n_layer=2, n_head=2,
                 n_embd=32, seed=0, **options):
    """transformers' own GPT-2, random to the last bias."""
    torch.manual_seed(seed)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=n_vocab, n_positions=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
        activation_function=gelu, bos_token_id=None, eos_token_id=None, **options))
    for name, p in hf.named_parameters():
        is_norm_weight = "ln_" in name and "weight" in name
        torch.nn.init.normal_(p, mean=float(is_norm_weight), std=0.3 if p.dim() == 2 else 0.1)
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
