"""Several training runs in the processes of one torchrun: a start of each would take longer.

    torchrun --standalone --nproc_per_node=2 tests/sharded_runs.py RUNS.json

RUNS.json is a list of dicts of flags, one for each run. A run begins where flags such as --resume
say.
"""

import dataclasses
import json
import sys
from pathlib import Path

import conftest  # noqa: F401 - it puts the repository on the path
import train_gpt2
from gptlib.checkpoints.start import load_start
from gptlib.distributed import join


def run_all(path):
    with join() as world:
        for flags in json.loads(Path(path).read_text()):
            known = [field.name for field in dataclasses.fields(train_gpt2.TrainConfig)]
            start = load_start(flags, world, known)
            cfg = train_gpt2.TrainConfig(**{**start.settings, **flags})
            train_gpt2.train(cfg, start, world)


if __name__ == "__main__":
    run_all(sys.argv[1])
