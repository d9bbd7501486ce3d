"""
How fast each part is, beside other programs and beside what the machine can do at best.

A machine's speed drifts within minutes, so contenders take turns in one run: trust their ratios.

All of them, then each by itself:
$ python bench.py all
$ python bench.py train --peer ../build-nanogpt ../nanoGPT
$ python bench.py train --preset gpt2-medium --batch_size 32 --profile
$ python bench.py decode --compile --rounds 9
$ python bench.py decode --streams 1 --length 512 --peer ../nanoGPT
$ python bench.py decode --quantize int8 --checkpoint_path log/latest_checkpoint.pt
$ python bench.py serve
$ python bench.py tokenize
$ python bench.py tokenize --source parquet
$ python bench.py hellaswag --hellaswag_data hellaswag_val.jsonl
$ python bench.py checkpoint
$ python bench.py start
How a step grows with batch, context and model, as a picture; two processes sharing this machine:
$ python bench.py growth --picture growth.png
$ python bench.py processes
The first ten minutes on a GPU; a part that fails or finds no time left is named:
$ python bench.py gpu --out FOLDER --seconds 600
The first ten minutes on several GPUs; without GPUs a rehearsal on two processes:
$ python bench.py several_gpus

What a token teaches, Muon beside AdamW (docs/learning.md); hours, it continues if stopped:
$ python bench.py learning --data_root DATASET --out FOLDER
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
from benches.floors import bench_floors
from benches.gpu import PARTS, bench_gpu
from benches.growth import bench_growth
from benches.hellaswag import bench_hellaswag
from benches.learning import SIZES, bench_learning
from benches.peers import peer_classes
from benches.processes import bench_processes
from benches.samples import bench_samples
from benches.serving import bench_serve
from benches.several_gpus import bench_several_gpus
from benches.start import bench_start
from benches.tokenizing import bench_tokenize
from benches.training import bench_train
from gptlib.common import ArgumentParser, UserError, log, run_main
from gptlib.inference.quantize import QUANTIZE_CHOICES
from gptlib.training.presets import PRESETS

# -----------------------------------------------------------------------------
# the command

BENCHES = dict(floors=bench_floors, train=bench_train, decode=bench_decode, serve=bench_serve,
               tokenize=bench_tokenize, hellaswag=bench_hellaswag, checkpoint=bench_checkpoint,
               start=bench_start, growth=bench_growth, processes=bench_processes)
# `all` leaves these out: they need a folder, a dataset or a checkpoint, and some take hours
ALONE = dict(gpu=bench_gpu, several_gpus=bench_several_gpus, learning=bench_learning,
             samples=bench_samples)


def make_parser():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("what", choices=(*BENCHES, *ALONE, "all"),
        help="all: everything but gpu, several_gpus, learning and samples")
    add("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="default: auto")
    add("--compile", action="store_true", help="decode, serve: the compiled engine as well")
    add("--quantize", default="none", choices=QUANTIZE_CHOICES,
        help="decode: int8 as well, and what it costs in quality")
    add("--checkpoint_path", default="log/latest_checkpoint.pt",
        help="samples, decode --quantize: the model whose samples or quality are measured "
             "(default: log/latest_checkpoint.pt)")
    add("--peer", nargs="+", default=[],
        help="train, decode: checkouts of build-nanogpt or nanoGPT")
    add("--preset", default="gpt2", choices=tuple(PRESETS),
        help="train, checkpoint, growth: the model (default: gpt2)")
    add("--batch_size", type=int, default=0,
        help="train: sequences per micro-batch (default: depends on the device)")
    add("--block_size", type=int, default=0,
        help="train: tokens per sequence (default: depends on the device)")
    add("--micro_steps", type=int, default=0,
        help="train: micro-batches per step (default: depends on the device)")
    add("--eager", action="store_true", help="train: train_gpt2.py without torch.compile as well")
    add("--profile", action="store_true",
        help="train: a profile of a step, with a trace in bench_trace.json")
    add("--streams", type=int, nargs="+",
        help="decode, serve, gpu: how many sequences at once (default: 1 8, of gpu 1 8 64)")
    add("--length", type=int, default=100,
        help="decode, serve, gpu: new tokens per sequence (default: 100)")
    add("--hellaswag_data", default="", help="HellaSwag jsonl file (default: download it once)")
    add("--examples", type=int,
        help="HellaSwag examples per turn (default: 32), or of the run of gpu (default: all)")
    add("--source", default="memory", choices=("memory", "parquet"),
        help="tokenize: text in memory to arrays (default), or parquet files to shards")
    add("--folder", default=".", help="checkpoint: the folder to write to (default: this one)")
    add("--out", default="", help="gpu, learning: the folder of its figures or runs")
    add("--seconds", type=float, default=600, help="gpu: how long it may take (default: 600)")
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART",
        help=f"gpu: of {', '.join(PARTS)} (default: all of them)")
    add("--presets", nargs="+", choices=tuple(PRESETS), metavar="PRESET",
        default=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
        help="gpu: the models to train; the first has all parts, the last is decoded too "
             "(default: the four sizes of GPT-2)")
    add("--picture", default="growth.png", help="growth: the picture's file (default: growth.png)")
    add("--data_root", default="", help="learning, gpu: a dataset, as fineweb.py writes it")
    add("--size", default="1.8M", choices=tuple(SIZES), help="learning: the model (default: 1.8M)")
    add("--steps", type=int, default=2000,
        help="learning: AdamW's steps of 2,048 tokens (default: 2000)")
    add("--adamw_embedding", type=float, default=1.0, metavar="RATIO",
        help="learning: AdamW's rate of the embeddings over that of the rest (default: 1)")
    add("--prompt", default="",
        help="samples: the text that they continue (default: the prompt of the run's own samples)")
    add("--num_samples", type=int, default=100, help="samples: how many (default: 100)")
    add("--jobs", type=int, default=1, help="learning: runs at the same time (default: 1)")
    return parser


def run_benches(args):
    """The results of one bench, or of all; of all, those that lack something are left out."""
    if args.what != "all":
        bench = {**BENCHES, **ALONE}[args.what]
        try:
            return {args.what: bench(args)}
        except ImportError as e:
            raise UserError(f"{e.name} is not installed") from e
    results = {}
    for name, bench in BENCHES.items():
        try:
            results[name] = bench(args)
        except (UserError, ImportError) as e:
            # without a vocabulary, examples or transformers the others still count
            log(f"\n{name}: left out, {e}")
    return results


def parse_flags():
    args = make_parser().parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}: expected at least 1")
    is_gpu = args.what == "gpu"
    if is_gpu and not args.out:
        raise UserError("bench.py gpu writes its figures into a folder: name it with --out")
    if not args.streams:
        args.streams = [1, 8, 64] if is_gpu else [1, 8]
    if args.examples is None and not is_gpu:
        args.examples = 32
    return args


def main():
    args = parse_flags()
    for peer in args.peer:
        peer_classes(peer, ("GPT", "GPTConfig"))  # an unusable peer fails before any work
    results = run_benches(args)
    print(json.dumps(dict(bench=args.what, torch=torch.__version__,
                          threads=torch.get_num_threads(), results=results)))
    failed = [name for what in ("gpu", "several_gpus")
              for name in results.get(what, {}).get("failed", ())]
    if failed:
        raise UserError(f"{len(failed)} parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
