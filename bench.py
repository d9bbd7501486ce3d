"""
How fast each part is, beside other programs and beside what the machine can do at best.

A machine's speed drifts within minutes, so contenders take turns in one run: trust their ratios.

$ python bench.py train --peer ../build-nanogpt ../nanoGPT
$ python bench.py train --preset gpt2-medium --batch_size 32
$ python bench.py decode --compile --rounds 9
$ python bench.py decode --streams 1 --length 512 --peer ../nanoGPT
$ python bench.py decode --quantize int8
$ python bench.py serve
$ python bench.py tokenize
$ python bench.py checkpoint
The first ten minutes on a GPU; a part that fails or finds no time left is named:
$ python bench.py gpu --out FOLDER --seconds 600
The first ten minutes on several GPUs; without GPUs a rehearsal on two processes:
$ python bench.py several_gpus
How many of a model's samples are Python:
$ python bench.py samples --checkpoint_path log/latest_checkpoint.pt

A peer is a checkout: git clone https://github.com/karpathy/build-nanogpt, or .../nanoGPT.
transformers is a peer if it is installed. Tables go to stderr while it runs; the last line of
stdout is one JSON object. Results: docs/speed.md; what was tried: docs/experiments.md.
"""

import json

import torch

from benches.checkpoints import bench_checkpoint
from benches.decoding import bench_decode
from benches.gpu import PARTS, bench_gpu
from benches.peers import peer_classes
from benches.samples import bench_samples
from benches.serving import bench_serve
from benches.several_gpus import bench_several_gpus
from benches.tokenizing import bench_tokenize
from benches.training import bench_train
from gptlib.common import ArgumentParser, UserError, run_main
from gptlib.inference.quantize import QUANTIZE_CHOICES
from gptlib.training.presets import PRESETS

BENCHES = dict(train=bench_train, decode=bench_decode, serve=bench_serve, tokenize=bench_tokenize,
               checkpoint=bench_checkpoint, gpu=bench_gpu, several_gpus=bench_several_gpus,
               samples=bench_samples)


def make_parser():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("what", choices=tuple(BENCHES))
    add("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="default: auto")
    add("--preset", default="gpt2", choices=tuple(PRESETS),
        help="train, decode, serve, checkpoint: the model (default: gpt2)")
    add("--peer", nargs="+", default=[],
        help="train, decode: checkouts of build-nanogpt or nanoGPT")
    for name, what in (("batch_size", "sequences per micro-batch"),
                       ("block_size", "tokens per sequence"),
                       ("micro_steps", "micro-batches per step")):
        add(f"--{name}", type=int, default=0,
            help=f"train, gpu: {what} (default: depends on the device)")
    add("--compile", action="store_true", help="decode, serve: the compiled engine as well")
    add("--quantize", default="none", choices=QUANTIZE_CHOICES, help="decode: int8 as well")
    add("--streams", type=int, nargs="+",
        help="decode, serve, gpu: how many sequences at once (default: 1 8, of gpu 1 8 64)")
    add("--length", type=int, default=100,
        help="decode, serve, gpu: new tokens per sequence (default: 100)")
    add("--out", default="", help="gpu: the folder of its figures")
    add("--seconds", type=float, default=600, help="gpu: how long it may take (default: 600)")
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART",
        help=f"gpu: of {', '.join(PARTS)} (default: all of them)")
    add("--presets", nargs="+", choices=tuple(PRESETS), metavar="PRESET",
        default=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
        help="gpu: the models to train; the first has all parts, the last is decoded too "
             "(default: the four sizes of GPT-2)")
    add("--data_root", default="", help="gpu: a dataset, as fineweb.py writes it")
    add("--hellaswag_data", default="", help="gpu: HellaSwag jsonl file (default: download it)")
    add("--examples", type=int, help="gpu: HellaSwag examples of its run (default: all)")
    add("--checkpoint_path", default="log/latest_checkpoint.pt",
        help="samples: the model (default: log/latest_checkpoint.pt)")
    add("--num_samples", type=int, default=100, help="samples: how many (default: 100)")
    return parser


def main():
    args = make_parser().parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}: expected at least 1")
    if not args.streams:
        args.streams = [1, 8, 64] if args.what == "gpu" else [1, 8]
    for peer in args.peer:
        peer_classes(peer)  # an unusable peer fails before any work
    try:
        results = BENCHES[args.what](args)
    except ImportError as e:
        raise UserError(f"{e.name} is not installed") from e
    print(json.dumps(dict(bench=args.what, torch=torch.__version__,
                          threads=torch.get_num_threads(), results={args.what: results})))
    if args.what in ("gpu", "several_gpus") and results["failed"]:
        raise UserError("failed: " + ", ".join(results["failed"]))


if __name__ == "__main__":
    run_main(main)
