"""Between text and tokens: encoding prompts, and decoding a sequence's tokens as they come."""

import codecs
import math
import queue
import time

from gptlib.common import warn
from gptlib.data.tokenizer import encode_text


def encode_prompt(model, tokenizer, prompt):
    """The token ids of a text; those of an empty text are <|endoftext|>, the start of a document.

    Warns if the text is longer than the model's context, and says where the rest begins.
    """
    tokens = encode_text(tokenizer, prompt) or [tokenizer.eot_token]
    n_cut = len(tokens) - model.config.block_size
    if n_cut > 0:
        beginning = tokenizer.decode(tokens[n_cut:n_cut + 12])
        warn(f"the prompt has {len(tokens)} tokens, the context {model.config.block_size}: "
             f"the first {n_cut} are left out, it begins at {beginning!r}")
    return tokens


def find_first(text, strings):
    """Where the earliest of these strings begins in the text, or None if it has none."""
    positions = [text.find(string) for string in strings]
    return min((position for position in positions if position >= 0), default=None)


def partial_match_length(text, strings):
    """How many characters at the end of the text may be the beginning of one of the strings."""
    longest = 0
    for string in strings:
        for length in range(1, len(string)):
            if text.endswith(string[:length]):
                longest = max(longest, length)
    return longest


class TextStream:
    """Iterate over a sequence's text as it is generated: whole characters, up to a stop string.

    stop: texts that end the continuation and are not part of it. step: the engine's step, if no
    other thread calls it. deadline: the time.monotonic() at which it stops waiting, with a
    TimeoutError. Afterwards `text` is the whole text, n_tokens the number of its tokens, and
    sequence.finish_reason says why it ended.
    """

    def __init__(self, sequence, tokenizer, stop=(), step=None, deadline=math.inf):
        self.sequence = sequence
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        self.step = step
        self.deadline = deadline
        self.text = ""
        self.n_tokens = 0

    def __iter__(self):
        # the decoder keeps the bytes of an unfinished character
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pending = ""  # text that may be the beginning of a stop string
        is_last = False
        while not is_last:
            token = self._next_token()
            is_last = token is None
            if is_last:
                pending += decoder.decode(b"", final=True)
            else:
                pending += decoder.decode(self.tokenizer.decode_single_token_bytes(token))
                self.n_tokens += 1
            end = find_first(pending, self.stop)
            if end is not None:
                self.sequence.finish_reason = "stop"  # the engine retires it at its next step
                is_last = True
            elif is_last:
                end = len(pending)
            else:
                end = len(pending) - partial_match_length(pending, self.stop)
            piece, pending = pending[:end], pending[end:]
            if piece:
                self.text += piece
                yield piece

    def _next_token(self):
        """The next token id, or None at the end. Raises TimeoutError at the deadline."""
        events = self.sequence.events
        while self.step and events.empty():
            self.step()
        if self.deadline == math.inf:
            return events.get()
        try:
            return events.get(timeout=max(0.0, self.deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
