"""
Evaluate a model on HellaSwag: of four endings of a text, which one does the model find likeliest?

A checkpoint of this repository, of build-nanogpt or nanoGPT; a GPT-2 of OpenAI; a Hugging Face
directory:
$ python hellaswag.py --checkpoint_path log/latest_checkpoint.pt
$ python hellaswag.py --model_type gpt2
$ python hellaswag.py --model_type path/to/directory --data my_val.jsonl --limit 200
On eight GPUs, and faster still in bfloat16, whose losses are rounded to two or three digits:
$ torchrun --standalone --nproc_per_node=8 hellaswag.py --model_type gpt2-xl --dtype bfloat16

The data, 10,042 examples from https://github.com/rowanz/hellaswag (arXiv:1905.07830), is downloaded
once. One line of it:
{"ctx": "A man is sitting on a roof. he", "label": 3,
 "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
             "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

The model chooses the ending whose tokens have the lowest loss in total (acc) or on average
(acc_norm by tokens; by characters it is what EleutherAI's harness calls acc_norm, see
docs/evaluate.md). It chooses as build-nanogpt's hellaswag.py does, whose published results for all
10,042 examples are:

                acc     acc_norm
gpt2 (124M)     0.2859  0.2955
gpt2-xl (1.5B)  0.3842  0.4893

The four endings of an example share its context, so the model reads the context only once: an
example is one row of tokens, the context followed by the endings, where each ending attends to the
context and to itself. Rows of similar length form a batch, and the output head with its 50k columns
is applied only to tokens whose loss is needed.
"""

from dataclasses import dataclass

import torch

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import ArgumentParser, UserError, run_main
from gptlib.config import add_flags, check_settings, setting
from gptlib.data.tokenizer import check_vocabulary, load_tokenizer
from gptlib.inference.quantize import QUANTIZE_CHOICES, quantize_int8
from gptlib.distributed import join, share_from_rank0
from gptlib.runtime import set_malloc, resolve_device, resolve_dtype
from gptlib.training.scoring import evaluate, load_examples
from train_gpt2 import GPT

SHORT_FLAGS = {"-m": "model_type", "-d": "device"}  # those of build-nanogpt's hellaswag.py


@dataclass
class HellaSwagConfig:
    checkpoint_path: str = setting(None, "a checkpoint file", optional=True)
    model_type: str = setting(None, "name of a GPT-2 (default: gpt2) or a Hugging Face directory",
                              optional=True)
    data: str = setting("", "HellaSwag jsonl file (default: download the validation set once)")
    limit: int = setting(None, "evaluate only the first LIMIT examples", 1, optional=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("float32", "float32 reproduces the published choice on every example; "
                         "bfloat16, float16 and auto are faster",
                         choices=("float32", "bfloat16", "float16", "auto"))
    quantize: str = setting("none", "int8: with the linear layers in 8 bits, as inference.py runs "
                            "them", choices=QUANTIZE_CHOICES)
    batch_tokens: int = setting(0, "tokens per forward pass; 0: what suits the device", 0)

    def __post_init__(self):
        check_settings(self)
        if self.checkpoint_path is not None and self.model_type is not None:
            raise UserError("--checkpoint_path and --model_type each name a model: give one")


def parse_flags():
    parser = ArgumentParser(__doc__)
    add_flags(parser, HellaSwagConfig)
    for flag, name in SHORT_FLAGS.items():
        parser.add_argument(flag, dest=name, help=f"short for --{name}")
    flags = vars(parser.parse_args())
    return HellaSwagConfig(**{name: value for name, value in flags.items() if value is not None})


def load_model(source):
    """Model and tokenizer of a checkpoint file, a GPT-2 name or a Hugging Face directory."""
    checkpoint = load_checkpoint(source, mmap=True)  # the state of the optimizers stays on disk
    model = GPT.from_checkpoint(checkpoint)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    check_vocabulary("the model", model.config.vocab_size, tokenizer)
    return model, tokenizer


def main():
    cfg = parse_flags()
    with join(cfg.device) as world:
        device = resolve_device(cfg.device, world.local_rank if world.size > 1 else None)
        dtype = resolve_dtype(cfg.dtype, device)
        set_malloc(device, keep=True)
        model, tokenizer = load_model(cfg.checkpoint_path or cfg.model_type or "gpt2")
        examples = load_examples(cfg.data)[:cfg.limit] if world.rank == 0 else None
        examples = share_from_rank0(examples, world)
        model = model.to(device)
        if cfg.quantize == "int8":
            model = quantize_int8(model, dtype)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        scores = evaluate(model, examples, tokenizer, autocast,
                          world.rank, world.size, cfg.batch_tokens)
        if world.rank == 0:
            print(f"{scores['examples']} examples, "
                  f"acc: {scores['acc']:.4f}, acc_norm: {scores['acc_norm']:.4f} by tokens, "
                  f"{scores['acc_norm_chars']:.4f} by characters")


if __name__ == "__main__":
    run_main(main)
