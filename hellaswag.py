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
(acc_norm). It chooses as build-nanogpt's hellaswag.py does, whose published results for all 10,042
examples are:

                acc     acc_norm
gpt2 (124M)     0.2859  0.2955
gpt2-xl (1.5B)  0.3842  0.4893

The four endings of an example share its context, so the model reads the context only once: an
example is one row of tokens, the context followed by the endings, where each ending attends to the
context and to itself. Rows of similar length form a batch, and the output head with its 50k columns
is applied only where a loss is needed.
"""

import torch

from gptlib.checkpoints.formats import load_checkpoint
from gptlib.common import ArgumentParser, UserError, run_main
from gptlib.inference.quantize import QUANTIZE_CHOICES, quantize_int8
from gptlib.distributed import distributed, share_from_rank0
from gptlib.runtime import set_malloc, resolve_device, resolve_dtype
from gptlib.training.scoring import evaluate, load_examples
from gptlib.data.tokenizer import check_vocabulary, load_tokenizer
from train_gpt2 import GPT


def parse_flags():
    parser = ArgumentParser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint_path", help="a checkpoint file")
    source.add_argument("-m", "--model_type", default="gpt2",
                        help="name of a GPT-2 (default: gpt2) or a Hugging Face directory")
    parser.add_argument("--data", default="",
                        help="HellaSwag jsonl file (default: download the validation set once)")
    parser.add_argument("--limit", type=int, help="evaluate only the first LIMIT examples")
    parser.add_argument("-d", "--device", default="auto",
                        help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="float32",
                        choices=("float32", "bfloat16", "float16", "auto"),
                        help="float32 (default) reproduces the published choice on every example; "
                             "the others are faster")
    parser.add_argument("--quantize", default="none", choices=QUANTIZE_CHOICES,
                        help="int8: with the linear layers in 8 bits, as inference.py runs them")
    parser.add_argument("--batch_tokens", type=int, default=0,
                        help="tokens per forward pass (default: depends on the device)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: expected at least 1")
    return args


def load_model(source):
    """Model and tokenizer of a checkpoint file, a GPT-2 name or a Hugging Face directory."""
    checkpoint = load_checkpoint(source, mmap=True)  # the state of the optimizers stays on disk
    model = GPT.from_checkpoint(checkpoint)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    check_vocabulary("the model", model.config.vocab_size, tokenizer)
    return model, tokenizer


def main():
    args = parse_flags()
    with distributed() as world:
        device = resolve_device(args.device, world.local_rank if world.size > 1 else None)
        dtype = resolve_dtype(args.dtype, device)
        set_malloc(device, keep=True)
        model, tokenizer = load_model(args.checkpoint_path or args.model_type)
        examples = load_examples(args.data)[:args.limit] if world.rank == 0 else None
        examples = share_from_rank0(examples, world)
        model = model.to(device)
        if args.quantize == "int8":
            model = quantize_int8(model, dtype)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        scores = evaluate(model, examples, tokenizer, autocast,
                          world.rank, world.size, args.batch_tokens)
        if world.rank == 0:
            print(f"{scores['examples']} examples, "
                  f"acc: {scores['acc']:.4f}, acc_norm: {scores['acc_norm']:.4f}")


if __name__ == "__main__":
    run_main(main)
