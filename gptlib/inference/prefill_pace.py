"""How many tokens of a new prompt to read between two tokens of the sequences that are running."""

import statistics
from collections import deque

# a forward pass over a few tokens takes as long as this many tokens more in a larger one
PASS_COST = 16
MIN_CHUNK = 16  # fewer would bring a prompt forward hardly faster than none
# The pass over the last tokens of a prompt also computes logits, and steps vary by a few per cent.
SHARE = 0.9
REMEMBERED_STEPS = 5  # their median: one slow step does not count, and a change counts soon


class PrefillPace:
    """Keeps the gap between two tokens of a running sequence within two usual ones.

    A usual gap is one decode step. While a prompt is being read, a gap is a decode step and a
    chunk of the prompt, so a chunk may take as long as a step. Both change: steps with the number
    of sequences and their lengths, chunks with their place in the context, and all of it with
    whatever else the machine does. So each chunk's size follows from how long the last ones took.

    chunk: the number of tokens to begin with, and the seconds that reading them took; largest:
    the most there may ever be. For devices that are done when a call returns.
    """

    def __init__(self, chunk, seconds, largest):
        self.chunk = chunk
        self.largest = largest
        self.steps = deque(maxlen=REMEMBERED_STEPS)
        self.seconds_per_token = seconds / (chunk + PASS_COST)

    def note_step(self, seconds):
        """Note how long a decode step took."""
        self.steps.append(seconds)

    def note_read(self, n_tokens, n_passes, seconds):
        """Note how long the passes took that read prompts before a decode step."""
        measured = seconds / (n_tokens + n_passes * PASS_COST)
        before = self.seconds_per_token
        # one pass that was interrupted says little about the next
        self.seconds_per_token = min(max(measured, before / 2), 2 * before)

    def next_chunk(self):
        """How many tokens to read before the next step."""
        if self.steps:
            limit = SHARE * statistics.median(self.steps)
            chunk = int(limit / self.seconds_per_token) - PASS_COST
            self.chunk = min(max(chunk, MIN_CHUNK), self.largest)
        return self.chunk
