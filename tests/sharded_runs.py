"""Several training runs in the processes of one torchrun: a start of each would take longer.

    torchrun --standalone --nproc_per_node=2 tests/sharded_runs.py RUNS.json

RUNS.json is a list of dicts of flags, one for each run. A run begins where flags such as --resume
say.
"""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401 - it puts the repository on the path
import train_gpt2
from gptlib.checkpoints.formats import load_initial_checkpoint
from gptlib.distributed import join


def run_all(path):
    with join() as world:
        for flags in json.loads(Path(path).read_text()):
            checkpoint = load_initial_checkpoint(flags, world)
            saved = checkpoint["train_config"] if checkpoint else {}
            train_gpt2.train(train_gpt2.TrainConfig(**{**saved, **flags}), checkpoint, world)


if __name__ == "__main__":
    run_all(sys.argv[1])
