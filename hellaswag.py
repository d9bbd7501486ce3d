"""
HellaSwag, multiple choice: which of four endings does the model find the likeliest? Owns the scoring rule.

A checkpoint of this repository (or build-nanogpt's, or nanoGPT's), OpenAI's GPT-2, a Hugging Face directory:
$ python hellaswag.py --checkpoint_path log/latest_checkpoint.pt
$ python hellaswag.py --model_type gpt2
$ python hellaswag.py --model_type path/to/directory --data my_val.jsonl --limit 200
On eight GPUs, and faster still, with losses rounded to two or three digits:
$ torchrun --standalone --nproc_per_node=8 hellaswag.py --model_type gpt2-xl --dtype bfloat16

The data, 10,042 examples of https://github.com/rowanz/hellaswag (arXiv:1905.07830), is downloaded once. A line of it:
{"ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap to wrap a pair of skis.", "is ripping
level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

The ending whose tokens cost the fewest nats in all (acc) or on average (acc_norm) is the model's choice. The choices
are those of build-nanogpt's hellaswag.py, which published for all 10,042:

                acc     acc_norm
gpt2 (124M)     0.2859  0.2955
gpt2-xl (1.5B)  0.3842  0.4893

The four endings of an example share its context, so it is read once: an example is one row of tokens, context and
endings side by side, where each ending sees the context and itself. Rows of similar length make a batch, and the head
with its 50k columns is applied only where a loss is read.
"""

import torch
import torch.distributed as dist

from gptlib.checkpoint import load_checkpoint
from gptlib.common import ArgumentParser, UserError, run_main
from gptlib.runtime import distributed, keep_freed_memory, resolve_device, resolve_dtype
from gptlib.scoring import evaluate, load_examples
from gptlib.tokenizer import load_tokenizer
from train_gpt2 import GPT


def main():
    parser = ArgumentParser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint_path", help="a checkpoint file")
    source.add_argument("-m", "--model_type", default="gpt2", help="GPT-2 name (default: gpt2) or HF directory")
    parser.add_argument("--data", default="", help="HellaSwag jsonl file (default: download the validation set once)")
    parser.add_argument("--limit", type=int, help="evaluate on the first so many examples only")
    parser.add_argument("-d", "--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"),
                        help="float32 (default) makes the published choices, example by example; the others are faster")
    parser.add_argument("--batch_tokens", type=int, default=0, help="tokens a forward pass (default: by the device)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: expected at least 1")

    with distributed() as world:
        device = resolve_device(args.device, world.local_rank if world.size > 1 else None)
        dtype = resolve_dtype(args.dtype, device)
        keep_freed_memory(device)
        checkpoint = load_checkpoint(args.checkpoint_path or args.model_type)
        model, tokenizer = GPT.from_checkpoint(checkpoint), load_tokenizer(checkpoint["tokenizer"])
        if tokenizer.n_vocab > model.config.vocab_size:
            raise UserError(f"the model knows {model.config.vocab_size} tokens, its tokenizer {tokenizer.name} has "
                            f"{tokenizer.n_vocab}: they don't belong together")
        examples = [load_examples(args.data)[:args.limit] if world.rank == 0 else None]
        if world.size > 1:
            dist.broadcast_object_list(examples, src=0)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        scores = evaluate(model.to(device), examples[0], tokenizer, autocast, world.rank, world.size, args.batch_tokens)
        if world.rank == 0:
            print(f"{scores['examples']} examples, acc: {scores['acc']:.4f}, acc_norm: {scores['acc_norm']:.4f}")


if __name__ == "__main__":
    run_main(main)
