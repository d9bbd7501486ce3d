"""Seconds from a command to its first result."""

import sys
import tempfile
from pathlib import Path

from benches.turns import ROOT, run_command, show_results, show_seconds, take_turns
from fineweb import PrepareConfig, prepare


def bench_start(args):
    """Whole processes per second: a training run of one step and a sample of one token, beside
    `import torch`, which takes most of either.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"The {n} green bottles are hanging on the wall.\n" for n in range(20000)]
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("".join(lines))
        prepare(PrepareConfig(f"{folder}/data", files=str(corpus), tokenizer="bpe",
                              vocab_size=300))

        def command(*argv):
            def work():
                run_command([sys.executable, *argv], cwd=folder)
                return 1
            return work

        device = f"--device={args.device}"
        train = command(str(ROOT / "train_gpt2.py"), "--preset=demo", "--data_root=data",
                        "--max_steps=1", "--val_tokens=128", "--num_samples=0", device)
        sample = command(str(ROOT / "inference.py"), "--max_length=1", device)
        contenders = {
            "train_gpt2.py, one step, evaluation, log": train,
            "inference.py, one token": sample,
            "python -c 'import torch'": command("-c", "import torch"),
        }
        results = take_turns(contenders, args.rounds, "runs")
    show_results("start", results)
    show_seconds(results)
    return {"start": results}
