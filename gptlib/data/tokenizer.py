"""GPT-2's BPE and byte-level BPEs trained here: always a tiktoken.Encoding with one special token.

That token is <|endoftext|>; its id is the last one in tokenizers that were trained here.
"""

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import tiktoken

from gptlib.common import UserError
from gptlib.data.shards import read_json, read_meta

EOT = "<|endoftext|>"

# -----------------------------------------------------------------------------
# how text is split into pieces, within which bytes merge

# A run of whitespace leaves its last character to the word that follows.
SPACES = r"|\s+(?!\S)|\s+"
# OpenAI's pattern has possessive quantifiers, which the regex engine takes step by step. The same
# pieces, spelled as one plain group and the whitespace, run on an automaton, which is much faster.
GPT2_SPLIT = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)" + SPACES
# For tokenizers trained here. Chinese and Japanese are written without spaces, so a piece also ends
# where the script changes (between the kanji of a stem and its hiragana ending). Accents and vowel
# signs stay with their letters. A suffix like 's belongs to the word before it; if there is
# none, as in 'self', the quotation mark stands alone.
BPE_SPLIT = (r"(?: ?\p{Han}+| ?\p{Hiragana}+| ?[\p{Katakana}ー]+"
             r"| ?[\p{L}\p{M}&&[^\p{Han}\p{Hiragana}\p{Katakana}]]+(?:'(?:[sdmt]|ll|ve|re))?"
             r"| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+)") + SPACES

# Hugging Face's tokenizer files spell each byte as one character: the character of that code if it
# can be printed, else one from U+0100 on.
UNPRINTABLE = [*range(33), *range(127, 161), 173]
CHAR_OF = {b: chr(256 + UNPRINTABLE.index(b) if b in UNPRINTABLE else b) for b in range(256)}
BYTE_OF = {char: b for b, char in CHAR_OF.items()}
# SHA-256 of GPT-2's tokens as dump_ranks writes them
GPT2_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# files of Hugging Face's other tokenizers, and the classes that may be GPT-2's
OTHER_TOKENIZERS = ("*.model", "*.spm", "vocab.txt")
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")


def spell(token):
    """A token's bytes as Hugging Face's tokenizer files spell them."""
    return "".join(CHAR_OF[b] for b in token)


def unspell(characters):
    """The bytes of a token that `spell` has spelled."""
    return bytes(BYTE_OF[char] for char in characters)


# -----------------------------------------------------------------------------
# tokenizers from and to bytes and directories


def make_encoding(name, ranks):
    """The tiktoken.Encoding with these {token bytes: rank}; EOT gets the id that they leave free.

    name: "gpt2"; "bpe", which splits text by BPE_SPLIT; or "bpe-gpt2", whose tokens are not GPT-2's
    and which splits text as GPT-2 does.
    """
    eot, = set(range(len(ranks) + 1)) - set(ranks.values())
    pattern = BPE_SPLIT if name == "bpe" else GPT2_SPLIT
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={EOT: eot}, explicit_n_vocab=len(ranks) + 1)


def dump_ranks(ranks):
    """{token bytes: rank} in tiktoken's file format: a line for each token, base64 and rank."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def parse_ranks(data):
    """The {token bytes: rank} of a file in tiktoken's format. Raises ValueError."""
    lines = [line.split() for line in data.splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def load_tokenizer(spec):
    """The tiktoken.Encoding of a dict from tokenizer_to_dict, or of a path for find_tokenizer."""
    if not isinstance(spec, dict):
        spec = find_tokenizer(spec)
    name = spec.get("name")
    if name not in ("gpt2", "bpe", "bpe-gpt2"):
        raise UserError(f"unknown tokenizer {name!r}, expected gpt2 or bpe: update this program")
    if name == "gpt2" and "ranks" not in spec:
        return load_gpt2()
    try:
        return make_encoding(name, parse_ranks(spec["ranks"]))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"damaged tokenizer ranks ({error}): make the dataset or checkpoint "
                        "again") from error


def byte_lengths(enc):
    """The bytes of text of each token id, as uint16 (vocab_size,); EOT has none."""
    lengths = np.zeros(enc.n_vocab, dtype=np.uint16)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def load_gpt2():
    """GPT-2's tokenizer, which tiktoken downloads once."""
    try:
        return make_encoding("gpt2", tiktoken.get_encoding("gpt2")._mergeable_ranks)
    except Exception as error:  # a dozen classes, and none says what to do
        raise UserError(
            f"cannot download the GPT-2 vocabulary ({type(error).__name__}). Set "
            "TIKTOKEN_CACHE_DIR to a directory, run once with internet access and it is kept "
            "there; or train a tokenizer on your own text: python fineweb.py --tokenizer bpe "
            "--vocab_size 4096") from error


def encode_text(enc, text):
    """The token ids of a text. Raises UserError if the tokenizer cannot encode it.

    tiktoken then panics (which is no Exception): at a run of a million spaces, which
    overflows the stack of its regex, or at a byte for which the tokenizer has no token.
    """
    try:
        return enc.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError("the tokenizer cannot encode this text: it has a run of characters that is "
                        "too long, or a byte for which there is no token") from error


def check_vocabulary(what, vocab_size, enc):
    """Raise UserError if a model, named by `what`, has fewer ids than its tokenizer."""
    if enc.n_vocab > vocab_size:
        raise UserError(f"{what} has {vocab_size} tokens, but its tokenizer {enc.name} has "
                        f"{enc.n_vocab}: they do not belong together")


def tokenizer_to_dict(enc):
    """A tokenizer as a checkpoint keeps it.

    {"name": "gpt2"}, or the name and "ranks", the contents of a .tiktoken file.
    """
    if enc.name == "gpt2":
        return {"name": "gpt2"}
    return {"name": enc.name, "ranks": dump_ranks(enc._mergeable_ranks)}


def find_tokenizer(path, meta=None):
    """The tokenizer of "gpt2", a dataset directory or a Hugging Face directory.

    meta: what read_meta returns for the directory, if it has been read already. Returns a dict like
    tokenizer_to_dict's. A directory without a tokenizer has GPT-2's tokens, as build-nanogpt's
    datasets do.
    """
    root = Path(path)
    if path == "gpt2":
        return {"name": "gpt2"}
    if not root.is_dir():
        raise UserError(f"no tokenizer in {root}: expected gpt2, a checkpoint, or a directory that "
                        f"is a dataset (python fineweb.py --data_root {root} makes one) or "
                        "Hugging Face's")
    is_hugging_face = (root / "tokenizer.json").exists() or (root / "vocab.json").exists()
    if not (root / "meta.json").exists():
        if is_hugging_face:
            return read_hugging_face(root)
        refuse_other_tokenizers(root)
    meta = read_meta(root) if meta is None else meta
    name = meta.get("tokenizer", "gpt2")
    if name == "gpt2":
        return {"name": "gpt2"}
    try:
        return {"name": name, "ranks": (root / "tokenizer.tiktoken").read_bytes()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): make the dataset "
                        "again") from error


# -----------------------------------------------------------------------------
# Hugging Face's tokenizer files


class NotUsable(Exception):
    """Why a tokenizer cannot be used here."""


def require(condition, reason):
    if not condition:
        raise NotUsable(reason)


def read_hugging_face(root):
    """The tokenizer of a Hugging Face directory, as a dict like tokenizer_to_dict's.

    It has to be a byte-level BPE that splits text as GPT-2 does or as BPE_SPLIT does. EOT has to be
    the only special token among its ids; special tokens after all others are left out. Raises
    UserError for any other kind.
    """
    try:
        spec = read_spec(root)
        require(spec["model"]["type"] == "BPE", f"it is {spec['model']['type']}, not BPE")
        require(not spec.get("normalizer"), "it changes the text (normalizer)")
        pattern = split_pattern(spec["pre_tokenizer"] or {})
        ranks = dump_ranks(ranks_of(spec["model"], spec.get("added_tokens", [])))
    except NotUsable as reason:
        raise UserError(f"the tokenizer of {root} can't be used here: {reason}") from reason
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the tokenizer of {root} can't be read ({type(error).__name__}: "
                        f"{error})") from error
    if pattern == BPE_SPLIT:
        return {"name": "bpe", "ranks": ranks}
    is_gpt2 = hashlib.sha256(ranks).hexdigest() == GPT2_RANKS
    return {"name": "gpt2" if is_gpt2 else "bpe-gpt2", "ranks": ranks}


def refuse_other_tokenizers(root):
    """Raise UserError if a directory has a tokenizer of another kind than byte-level BPE."""
    files = [path.name for pattern in OTHER_TOKENIZERS for path in root.glob(pattern)]
    name = class_of_tokenizer(root)
    if files or name not in GPT2_CLASSES:
        kind = files[0] if files else f"a {name}"
        raise UserError(f"the tokenizer of {root} can't be used here: it is {kind}, expected a "
                        "tokenizer.json of a byte-level BPE")


def class_of_tokenizer(root):
    """What tokenizer_config.json calls the tokenizer's class, or None if there is none."""
    try:
        config = json.loads((root / "tokenizer_config.json").read_bytes())
        return config.get("tokenizer_class")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{root / 'tokenizer_config.json'} can't be read ({error})") from error


def read_spec(root):
    """The contents of tokenizer.json, or the same from the two files that GPT-2 came in."""
    if (root / "tokenizer.json").exists():
        return read_json(root / "tokenizer.json")
    name = class_of_tokenizer(root)
    require(name in GPT2_CLASSES, f"its class is {name}, expected GPT2Tokenizer")
    lines = (root / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocab = read_json(root / "vocab.json")
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}


def split_pattern(pre_tokenizer):
    """The pattern by which a tokenizer splits text: GPT2_SPLIT or BPE_SPLIT, else NotUsable.

    Either ByteLevel splits, with GPT-2's pattern built in, or one Split before it does.
    """
    *first, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    pattern = GPT2_SPLIT
    if len(first) == 1:
        pattern = first[0].get("pattern", {}).get("Regex")
    is_byte_level = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    splits_once = last.get("use_regex", True) != bool(first)
    is_known = pattern in (GPT2_SPLIT, BPE_SPLIT)
    require(is_byte_level and splits_once and is_known, "it splits text in another way")
    return pattern


def ranks_of(model, added_tokens):
    """{token bytes: rank} of a BPE model in tokenizer.json, without its special tokens."""
    special = {token["content"] for token in added_tokens} | {EOT}
    ids = {token["content"]: token["id"] for token in added_tokens} | model["vocab"]
    words = {token: i for token, i in model["vocab"].items() if token not in special}
    used = {*words.values(), ids.get(EOT)}
    require(used == set(range(len(words) + 1)),
            f"expected {EOT} and no other special token before the last of the ids")

    characters = {char for token in words for char in token}
    require(characters <= BYTE_OF.keys() <= words.keys(), "not byte-level")

    # tiktoken merges the pair with the lowest id first, so the merges have to be in that order
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [words["".join(pair)] for pair in pairs]
    in_order = merges == sorted(merges) and len(words) == 256 + len(set(merges))
    require(in_order, "its merges are not in the order of the ids")
    return {unspell(token): i for token, i in words.items()}


def export_tokenizer(enc, directory, max_length):
    """Write the files from which transformers' AutoTokenizer makes the same ids.

    They are tokenizer.json and tokenizer_config.json; max_length: the model's context, in tokens.
    """
    ranks = dict(sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))
    # tiktoken merges any two tokens that together are a third. Here each such pair has to be named.
    merges = []
    for token in ranks:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in ranks and right in ranks:
                merges.append((spell(left), spell(right)))
    vocab = {spell(token): i for token, i in ranks.items()} | {EOT: enc.eot_token}
    bpe = hugging_face_bpe(enc._pat_str, vocab=vocab, merges=merges)
    bpe.add_special_tokens([EOT])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": EOT, "eos_token": EOT, "unk_token": EOT,
                "model_max_length": max_length, "clean_up_tokenization_spaces": False}
    directory = Path(directory)
    (directory / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def hugging_face_bpe(pattern, **model):
    """A tokenizers.Tokenizer that splits text by the pattern and merges bytes within the pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    bpe = Tokenizer(models.BPE(**model))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train_bpe(texts, vocab_size, name="bpe"):
    """Train a byte-level BPE on an iterator of str: "bpe" with our own pattern, or "bpe-gpt2".

    vocab_size counts the 256 bytes, the merges and EOT; a short text gives fewer. Returns a
    tiktoken.Encoding.
    """
    from tokenizers import trainers
    bpe = hugging_face_bpe(BPE_SPLIT if name == "bpe" else GPT2_SPLIT)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=list(BYTE_OF),
                                  show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    # Its threads do not survive a fork, so it has to do without them from now on.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return make_encoding(name, {unspell(token): i for token, i in bpe.get_vocab().items()})
