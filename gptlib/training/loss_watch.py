"""Tells from the losses of a run that it has diverged, or that it overfits."""

import math
import statistics

# A run counts as diverged after this many steps with a high loss; one that is not high takes two of
# them back, so that noise does not begin the count anew.
HIGH_STEPS = 100
LOST_SHARE = 0.25  # of what was learned, above which a loss is high
SMOOTHING = 0.02  # of the running mean: it follows the last 50 steps
LEAST_MARGIN = 0.5  # nats above the running mean; while little is learned, noise is as large

# A validation loss counts as risen if it is above the lowest one by this share, in several
# evaluations in a row.
RISEN_BY = 0.005
RISEN_TIMES = 2


class Divergence:
    """Finds a training loss that stays far above its running mean.

    A loss is high if a quarter of what was learned is lost: if it lies more than a quarter of the
    way from the running mean to ln(vocab_size), the loss of a model that knows nothing. A spike of
    some steps is not divergence, since training recovers from it. High losses do not enter the
    mean, which would follow them.
    """

    def __init__(self, vocab_size):
        self.ignorant_loss = math.log(vocab_size)
        self.mean = None
        self.high_steps = 0
        self.since = None  # the first of them

    def add(self, step, loss):
        """Take the loss of a step. Returns whether the run has diverged."""
        if self.mean is None and math.isfinite(loss):
            self.mean = loss
        if self.mean is None or not self._is_high(loss):
            self.high_steps = max(self.high_steps - 2, 0)
            if math.isfinite(loss):
                self.mean += SMOOTHING * (loss - self.mean)
            return False
        if self.high_steps == 0:
            self.since = step
        self.high_steps += 1
        return self.high_steps >= HIGH_STEPS

    def _is_high(self, loss):
        learned = self.ignorant_loss - self.mean
        limit = self.mean + max(LOST_SHARE * learned, LEAST_MARGIN)
        return not loss <= limit  # NaN is high too


def find_overfitting(records):
    """What to say if a run overfits: its training loss falls while its validation loss rises.

    records: those of log.jsonl. Returns a sentence, or None.
    """
    evaluations = list_evaluations(records)
    if len(evaluations) <= RISEN_TIMES:
        return None
    best = min(evaluations[:-RISEN_TIMES], key=lambda e: e[1])
    last = evaluations[-1]
    risen = [val for _, val, _ in evaluations[-RISEN_TIMES:] if val > best[1] * (1 + RISEN_BY)]
    if len(risen) < RISEN_TIMES or last[2] >= best[2]:
        return None
    return (f"the model overfits: since step {best[0]} the validation loss has risen from "
            f"{best[1]:.4f} to {last[1]:.4f}, while the training loss fell from {best[2]:.4f} to "
            f"{last[2]:.4f}. More text, --dropout, a smaller model or fewer steps help; "
            "--keep_best keeps the model of the lowest validation loss")


def list_evaluations(records):
    """(step, validation loss, mean training loss since the evaluation before) of each evaluation
    that follows steps, if both are finite."""
    found, since = [], []
    for record in records:
        loss = record.get("loss")
        if record["kind"] == "train" and loss is not None:
            since.append(loss)
        if record["kind"] == "val" and since:
            if loss is not None:
                found.append((record["step"], loss, statistics.mean(since)))
            since = []
    return found
