"""What a run leaves to look at: log.jsonl, log.txt, log.png, and optionally wandb and TensorBoard."""

import contextlib
import itertools
import json
import math
import os
import sys
from pathlib import Path

from gptlib.checkpoint import list_checkpoints
from gptlib.common import UserError, atomic_write, import_optional


class RunLog:
    """What a run leaves to look at: log.jsonl (all that is known), log.txt (step, kind, value a line) and log.png.

    A disk that is full warns once and never stops the run.
    """

    def __init__(self, cfg, step, facts):
        """Start afresh where step is None, after moving an earlier run out of the way; else go on at `step`."""
        self.dir = Path(cfg.log_dir)
        self.warned = False
        self.sinks = []
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if step is None:
                names = ("log.*", "model_*.pt", "latest_checkpoint.pt", "tensorboard")
                self._move_aside([path for name in names for path in self.dir.glob(name)])
            else:  # later checkpoints belong to a course that this run leaves, or are torn
                self._move_aside([path for path in list_checkpoints(self.dir) if int(path.stem[6:]) > step])
                self._drop_after(step)
        except OSError as e:
            raise UserError(f"--log_dir {cfg.log_dir} can't be written to: {e.strerror}") from e
        self._append("log.jsonl", json.dumps({"kind": "config" if step is None else "resume", "step": step or 0, **facts}))
        if cfg.wandb:
            run = import_optional("wandb").init(project="gpt2", dir=cfg.log_dir, config=facts["config"])
            self.sinks.append(lambda name, value, step: run.log({name: value}, step=step))
        if cfg.tensorboard:
            writer = import_optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(self.dir / "tensorboard")
            self.sinks.append(writer.add_scalar)

    def _move_aside(self, paths):
        """Move what an earlier run left into the first free numbered folder beside this one: nothing is overwritten."""
        if paths:
            asides = (self.dir.with_name(f"{self.dir.name}_{i:03d}") for i in itertools.count(1))
            aside = next(path for path in asides if not path.exists())
            aside.mkdir()
            for path in paths:
                os.replace(path, aside / path.name)
            print(f"moved {len(paths)} files of an earlier run from {self.dir} to {aside}")

    def _drop_after(self, step):
        """Drop what the run wrote after its checkpoint at `step`: training step k comes after checkpoint k."""
        kept = [r for r in self._records() if r["step"] < step or r["step"] == step and r["kind"] != "train"]
        text = "".join(self._line(r) + "\n" for r in kept if r["kind"] in self.VALUE)
        atomic_write(self.dir / "log.txt", lambda f: f.write(text.encode()))
        atomic_write(self.dir / "log.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in kept).encode()))

    VALUE = {"train": ("loss", ".6f"), "val": ("loss", ".4f"), "hella": ("acc_norm", ".4f")}  # what log.txt tells of each

    def _line(self, record):
        name, digits = self.VALUE[record["kind"]]
        return f"{record['step']} {record['kind']} {math.nan if record[name] is None else record[name]:{digits}}"

    def _records(self):
        path = self.dir / "log.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # a crash cut it short
                records.append(json.loads(line))
        return records

    def _append(self, name, line):
        try:
            with open(self.dir / name, "a") as f:
                f.write(line + "\n")
        except OSError as e:
            if not self.warned:
                print(f"warning: {self.dir / name} can't be written to ({e.strerror}); training goes on", file=sys.stderr)
            self.warned = True

    def write(self, step, kind, **values):
        """Record the values of a kind (train, val, hella) at a step."""
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        record = {"kind": kind, "step": step, **finite}
        self._append("log.jsonl", json.dumps(record))
        self._append("log.txt", self._line(record))
        for sink in self.sinks:
            for name, value in values.items():
                if value is not None:
                    sink(f"{kind}/{name}", value, step)

    def draw(self, gpt2_tokens):
        """Redraw log.png, with the published GPT-2 and GPT-3 lines where the tokens are GPT-2's."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        records = self._records()

        def curve(kind):
            name, _ = self.VALUE[kind]
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r[name] is not None]
            return [x for x, _ in points], [y for _, y in points]

        train, val, hella = map(curve, self.VALUE)
        fig, axes = plt.subplots(1, 2 if hella[0] else 1, figsize=(13 if hella[0] else 7, 4.5), squeeze=False)
        axes[0][0].plot(*train, lw=0.8, alpha=0.6, label="train")
        axes[0][0].plot(*val, marker=".", label=f"val {val[1][-1]:.4f}" if val[1] else "val")
        axes[0][0].set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
        if hella[0]:
            axes[0][1].plot(*hella, marker=".", label=f"this run {hella[1][-1]:.4f}")
            axes[0][1].set(xlabel="step", ylabel="acc_norm", title="HellaSwag")
        if gpt2_tokens:
            axes[0][0].axhline(3.2924, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M) on FineWeb-Edu val")
            if hella[0]:
                axes[0][1].axhline(0.2945, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M)")
                axes[0][1].axhline(0.337, color="g", ls="--", lw=1, label="OpenAI GPT-3 (124M)")
        for ax in axes[0]:
            ax.grid(alpha=0.3)
            ax.legend()
        fig.tight_layout()
        with contextlib.suppress(UserError):  # a full disk; the next evaluation tries again
            atomic_write(self.dir / "log.png", lambda f: fig.savefig(f, format="png", dpi=110))
        plt.close(fig)
