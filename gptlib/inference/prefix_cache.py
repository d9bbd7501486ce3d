"""Which tokens the slots of the KV cache hold, so that prompts that begin alike can reuse them.

This takes no memory: a sequence that has ended stays in its slot until the slot is needed.
"""

from dataclasses import dataclass

# copying fewer tokens gains nothing: reading them with the rest takes hardly longer
MIN_SHARED = 16


@dataclass
class Content:
    """The tokens whose keys and values a slot holds: `length` of a sequence's, from `start` on."""
    sequence: object
    start: int
    length: int
    last_used: int = 0  # when: the number of uses of any slot until then

    def tokens(self):
        """The tokens that are known: the last ones may still be on their way to the host."""
        all_tokens = self.sequence.prompt + self.sequence.tokens
        return all_tokens[self.start:self.start + self.length]

    def begins_like(self, tokens):
        """How many of the first tokens equal those of `tokens`."""
        n_equal = 0
        for a, b in zip(self.tokens(), tokens, strict=False):
            if a != b:
                break
            n_equal += 1
        return n_equal


class PrefixCache:
    """The KV cache of all slots, and the Content of those that no live sequence has.

    cache: a KVCache; keep: whether sequences that have ended are kept at all.
    """

    def __init__(self, cache, keep=True):
        self.cache = cache
        self.keep = keep
        self.contents = [None] * cache.keys[0].size(0)
        self.uses = 0

    def hold(self, slot, sequence):
        """Note that a slot holds what its sequence has cached so far."""
        self.uses += 1
        self.contents[slot] = Content(sequence, sequence.window_start, sequence.pos, self.uses)

    def release(self, slot, sequence):
        """Keep what a sequence leaves in its slot, unless it has failed."""
        if self.keep and sequence.finish_reason != "error":
            self.hold(slot, sequence)
        else:
            self.forget(slot)

    def forget(self, slot):
        self.contents[slot] = None

    def forget_all(self):
        self.contents = [None] * len(self.contents)

    def first_tokens(self, first, end):
        """The first token of what each of these slots holds; 0 for none."""
        tokens = []
        for content in self.contents[first:end]:
            known = content.tokens() if content else []
            tokens.append(known[0] if known else 0)
        return tokens

    def find(self, tokens, live):
        """The slot whose content has the longest beginning in common with tokens, and its length.

        live: the sequences of the first slots. The last of the tokens never counts: the model has
        to read one for the logits. Returns (None, 0) if there is too little in common.
        """
        best, longest = None, 0
        if not self.keep:
            return best, longest
        contents = [Content(sequence, sequence.window_start, sequence.pos) for sequence in live]
        contents += self.contents[len(live):]
        for slot, content in enumerate(contents):
            if content is None:
                continue
            n_equal = min(content.begins_like(tokens), len(tokens) - 1)
            if n_equal >= MIN_SHARED and n_equal > longest:
                best, longest = slot, n_equal
        return best, longest

    def claim(self, slot, source=None, n_shared=0):
        """Make a slot ready for a new sequence and copy n_shared tokens of slot `source` into it.

        All slots from `slot` on have to be free. The content used least recently is given up, or
        the source itself if the new sequence shares most of it.
        """
        free = range(slot, len(self.contents))
        victim = min(free, key=self._last_used)
        content = self.contents[source] if source is not None and source in free else None
        if content:
            self.uses += 1
            content.last_used = self.uses
            if 2 * n_shared >= content.length:
                victim = source
        if victim != slot:
            self.swap(slot, self._length(slot), victim, self._length(victim))
            self.contents[victim] = self.contents[slot]
            source = {slot: victim, victim: slot}.get(source, source)
        self.forget(slot)
        if source is not None:
            self.copy(source, slot, n_shared)

    def move(self, source, target, length):
        """Move `length` positions to a free slot; what that one held takes their place."""
        if source != target:
            self.swap(source, length, target, self._length(target))
            self.contents[source] = self.contents[target]
        self.forget(target)

    def exchange(self, slot, sequence, last_slot, last):
        """Give the slot of a sequence that ends to the last live one; if kept, they swap slots."""
        if self.keep and sequence.finish_reason != "error":
            self.swap(slot, sequence.pos, last_slot, last.pos)
        else:
            self.copy(last_slot, slot, last.pos)

    def _last_used(self, slot):
        return self.contents[slot].last_used if self.contents[slot] else 0

    def _length(self, slot):
        return self.contents[slot].length if self.contents[slot] else 0

    def swap(self, a, length_a, b, length_b):
        """Exchange the first length_a positions of slot a and the first length_b of slot b."""
        for tensor in self.cache.keys + self.cache.values:
            old = tensor[a, :, :length_a].clone()
            tensor[a, :, :length_b] = tensor[b, :, :length_b]
            tensor[b, :, :length_a] = old

    def copy(self, source, target, length):
        """Copy the first `length` positions of one slot to another."""
        if source == target:
            return
        for tensor in self.cache.keys + self.cache.values:
            tensor[target, :, :length] = tensor[source, :, :length]
