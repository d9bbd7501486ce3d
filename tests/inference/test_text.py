"""Tokens become text as they come: whole characters, up to a stop string.

    python -m pytest tests/inference/test_text.py
"""

import pytest
from byte_model import N_VOCAB, as_text, make_model, make_tokenizer, uncached

from gptlib.inference.engine import Engine, Sequence
from gptlib.inference.sampling import SamplingParams
from gptlib.inference.text import TextStream, encode_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def finished_stream(data, tokenizer, stop=()):
    """The stream of a sequence whose continuation is these bytes."""
    sequence = Sequence([1], SamplingParams())
    for token in data:
        sequence.events.put(token)
    sequence.finish_reason = "length"
    sequence.events.put(None)
    return TextStream(sequence, tokenizer, stop)


def test_characters_of_several_bytes_are_never_split(tokenizer):
    """Guards against replacement characters where a character takes several tokens."""
    text = "naïve 日本語 🙂 e\u0301"
    stream = finished_stream(text.encode(), tokenizer)
    assert list(stream) == list(text)
    assert stream.text == text
    assert stream.n_tokens == len(text.encode())


def test_invalid_bytes_become_replacement_characters(tokenizer):
    """Guards against an exception, or lost text, where a model writes no valid UTF-8."""
    stream = finished_stream(b"a\xffb\xe6\x97", tokenizer)
    assert "".join(stream) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("text, stop, expected", [
    ("one END two", ["END"], "one "),
    ("one EN two", ["END"], "one EN two"),  # what was held back comes after all
    ("one EN", ["END"], "one EN"),
    ("EENDS", ["END"], "E"),
    ("aab", ["aab", "ab"], ""),
    ("ababac!", ["abac"], "ab"),
    ("日本語", ["本"], "日"),
    ("one two", ["two", "one"], ""),  # the earliest in the text, not in the list
])
def test_stop_strings_end_the_text_and_are_not_in_it(tokenizer, text, stop, expected):
    """Guards against a stop string that is shown in part, missed, or ends the text too late."""
    stream = finished_stream(text.encode(), tokenizer, stop)
    assert "".join(stream) == expected
    assert stream.text == expected
    assert stream.sequence.finish_reason == ("stop" if expected != text else "length")


def test_a_stop_string_cancels_the_request(model, tokenizer):
    """Guards against an engine that goes on with a sequence that nobody reads any more."""
    engine = Engine(model, slots=1, n_vocab=N_VOCAB)
    expected = as_text(uncached(model, [65], 40))
    stop = expected[9:12]
    sequence = engine.submit([65], max_length=10**6, temperature=0)
    stream = TextStream(sequence, tokenizer, [stop], engine.step)
    assert "".join(stream) == expected[:expected.find(stop)]
    assert sequence.finish_reason == "stop"
    assert not engine.step()
    assert not engine.live


def test_a_cut_prompt_is_reported(model, tokenizer, capsys):
    """Guards against a prompt that is cut in silence."""
    tokens = encode_prompt(model, tokenizer, "abcdefghijklmnopqrstuvwxyz")
    assert len(tokens) == 26, "the engine cuts it, not the encoder"
    warning = capsys.readouterr().err
    assert "26 tokens, the context 24: the first 2 are left out, it begins at 'cdef" in warning
