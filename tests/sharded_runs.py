"""Several training runs in the processes of one torchrun: a start of each would take longer.

    torchrun --standalone --nproc_per_node=2 tests/sharded_runs.py RUNS.json

RUNS.json is a list of dicts of flags, one for each run. A run begins where flags such as --resume
say. A run that ends with a UserError leaves its text in the file LOG_DIR/error.txt.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_all(path):
    import train_gpt2
    from gptlib.checkpoint import load_initial_checkpoint
    from gptlib.common import UserError
    from gptlib.runtime import distributed

    with distributed() as world:
        for flags in json.loads(Path(path).read_text()):
            checkpoint = load_initial_checkpoint(flags, world)
            saved = checkpoint["train_config"] if checkpoint else {}
            try:
                train_gpt2.train(train_gpt2.TrainConfig(**{**saved, **flags}), checkpoint, world)
            except UserError as error:
                Path(flags["log_dir"], f"error{world.rank}.txt").write_text(str(error))


if __name__ == "__main__":
    run_all(sys.argv[1])
