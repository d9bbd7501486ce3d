"""How many tokens of a new prompt to read between two tokens of the sequences that are running."""

import statistics
from collections import deque

# a forward pass over a few tokens takes as long as this many tokens more in a larger one
PASS_COST = 16
MIN_CHUNK = 16  # fewer would bring a prompt forward hardly faster than none
# The pass over the last tokens of a prompt also computes logits, and steps vary by a few per cent.
SHARE = 0.9
REMEMBERED_STEPS = 16


class PrefillPace:
    """Keeps the gap between two tokens of a running sequence within two usual ones.

    A usual gap is one decode step. While a prompt is being read, a gap is a decode step and a
    chunk of the prompt, so a chunk may take as long as a step. Both change: steps with the number
    of sequences and their lengths, chunks with their place in the context, and all of it with
    whatever else the machine does. So each chunk's size follows from how long the last ones took.

    chunk: the number of tokens to begin with; largest: the most there may ever be. For devices
    that are done when a call returns.
    """

    def __init__(self, chunk, largest):
        self.chunk = chunk
        self.largest = largest
        self.steps = deque(maxlen=REMEMBERED_STEPS)

    def note_step(self, seconds):
        """Note how long a decode step took."""
        self.steps.append(seconds)

    def note_read(self, n_tokens, n_passes, seconds):
        """Note how long tokens took that were read before a decode step; sets the next chunk."""
        if not self.steps:
            return
        # a pass takes as long as its tokens and PASS_COST more
        seconds_per_token = seconds / (n_tokens + n_passes * PASS_COST)
        limit = SHARE * statistics.median(self.steps)
        chunk = int(limit / seconds_per_token) - PASS_COST
        # one pass that was interrupted says little about the next
        chunk = min(max(chunk, self.chunk // 2), 2 * self.chunk)
        self.chunk = min(max(chunk, MIN_CHUNK), self.largest)
