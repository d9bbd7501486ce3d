"""GPT-2's BPE and byte-level BPEs trained here: always a tiktoken.Encoding with one special token, <|endoftext|>."""

import base64
import hashlib
import json
import os
from pathlib import Path

import tiktoken

from gptlib.common import UserError
from gptlib.dataset import read_meta


EOT = "<|endoftext|>"


# step by step. The same pieces, spelled as one plain group and the whitespace, run on an automaton: much faster.
SPACES = r"|\s+(?!\S)|\s+"  # a run of whitespace leaves its last character to the word that follows
GPT2_SPLIT = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)" + SPACES
# For tokenizers trained here. Chinese and Japanese write no spaces, so a piece also ends where the script changes (a
# kanji stem, its hiragana ending). Accents and vowel signs stay with their letters, 's with its word, not with 'self'.
BPE_SPLIT = (r"(?: ?\p{Han}+| ?\p{Hiragana}+| ?[\p{Katakana}ー]+"
             r"| ?[\p{L}\p{M}&&[^\p{Han}\p{Hiragana}\p{Katakana}]]+(?:'(?:[sdmt]|ll|ve|re))?"
             r"| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+)") + SPACES


# Tokenizer files of Hugging Face spell a byte as the character of that number where that prints, else as one from U+0100 on
SILENT = [*range(33), *range(127, 161), 173]
BYTE_OF = {chr(256 + SILENT.index(b) if b in SILENT else b): b for b in range(256)}
# SHA-256 of GPT-2's tokens as dump_ranks writes them
GPT2_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def make_encoding(name, ranks):
    """The Encoding with these {token bytes: rank}; <|endoftext|> gets the id that they leave free, the last unless foreign.

    name: "gpt2"; "bpe", with BPE_SPLIT; or "bpe-gpt2", other tokens than GPT-2's that split text as it does.
    """
    eot, = set(range(len(ranks) + 1)) - set(ranks.values())
    return tiktoken.Encoding(name, pat_str=BPE_SPLIT if name == "bpe" else GPT2_SPLIT, mergeable_ranks=ranks,
                             special_tokens={EOT: eot}, explicit_n_vocab=len(ranks) + 1)


def dump_ranks(ranks):
    """{token bytes: rank} as tiktoken's own file format: base64 and rank, a line a token."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in in_order)


def load_tokenizer(spec):
    """The tiktoken.Encoding of tokenizer_to_dict's result, or of whatever find_tokenizer takes."""
    if not isinstance(spec, dict):
        spec = find_tokenizer(spec)
    name = spec.get("name")
    if name not in ("gpt2", "bpe", "bpe-gpt2"):
        raise UserError(f"unknown tokenizer {name!r}, expected gpt2 or bpe: update this program")
    if name != "gpt2" or "ranks" in spec:
        try:
            lines = map(bytes.split, spec["ranks"].splitlines())
            return make_encoding(name, {base64.b64decode(token): int(rank) for token, rank in lines})
        except (KeyError, ValueError, AssertionError) as error:
            raise UserError(f"damaged tokenizer ranks ({error}): make the dataset or checkpoint again") from error
    try:
        return make_encoding("gpt2", tiktoken.get_encoding("gpt2")._mergeable_ranks)
    except Exception as error:  # a dozen kinds, and none says what to do
        raise UserError(f"cannot download the GPT-2 vocabulary ({type(error).__name__}). Set TIKTOKEN_CACHE_DIR to a "
                        "directory, run once with internet access and it is kept there; or train a tokenizer on your "
                        "own text: python fineweb.py --tokenizer bpe --vocab_size 4096") from error


def tokenizer_to_dict(enc):
    """What a checkpoint keeps of a tokenizer: {"name": "gpt2"}, or its name and its "ranks", a .tiktoken file."""
    return {"name": "gpt2"} if enc.name == "gpt2" else {"name": enc.name, "ranks": dump_ranks(enc._mergeable_ranks)}


def find_tokenizer(path):
    """The tokenizer, as a dict like tokenizer_to_dict's, of "gpt2", a dataset or Hugging Face directory, or a checkpoint.

    A directory that has none is of GPT-2's tokens, as build-nanogpt's are.
    """
    root = Path(path)
    if path == "gpt2":
        return {"name": "gpt2"}
    if not root.is_dir():
        raise UserError(f"no tokenizer in {root}: expected gpt2, a checkpoint, or a directory that is a dataset (python "
                        f"fineweb.py --data_root {root} makes one) or Hugging Face's")
    if not (root / "meta.json").exists() and any((root / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return read_hugging_face(root)
    name = read_meta(root).get("tokenizer", "gpt2")
    try:
        return {"name": name} | ({} if name == "gpt2" else {"ranks": (root / "tokenizer.tiktoken").read_bytes()})
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): make the dataset again") from error


def read_hugging_face(root):
    """The tokenizer of a Hugging Face directory, as a dict like tokenizer_to_dict's; UserError where it is of another kind.

    It may be a byte-level BPE that splits text as GPT-2 does or as this program does, with <|endoftext|> and no other
    special token among the ids; special tokens after all others are left out.
    """
    def need(condition, what):
        if not condition:
            raise UserError(f"the tokenizer of {root} can't be used here: {what}")

    try:
        if (root / "tokenizer.json").exists():
            spec = json.loads((root / "tokenizer.json").read_bytes())
        else:  # as GPT-2 was first published
            merges = (root / "merges.txt").read_text(encoding="utf-8").splitlines()
            spec = {"model": {"type": "BPE", "vocab": json.loads((root / "vocab.json").read_bytes()),
                              "merges": [line for line in merges if line and not line.startswith("#version")]},
                    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
        model, split = spec["model"], spec["pre_tokenizer"] or {}
        need(model["type"] == "BPE", f"it is {model['type']}, not BPE")
        need(not spec.get("normalizer"), "it changes the text (normalizer)")
        *first, last = split.get("pretokenizers", [split])
        pattern = first[0].get("pattern", {}).get("Regex") if len(first) == 1 else GPT2_SPLIT
        need(last.get("type") == "ByteLevel" and not last["add_prefix_space"] and pattern in (GPT2_SPLIT, BPE_SPLIT)
             and last.get("use_regex", True) != bool(first), "it splits text in another way")
        special = {token["content"] for token in spec.get("added_tokens", [])} | {EOT}
        ids = {token["content"]: token["id"] for token in spec.get("added_tokens", [])} | model["vocab"]
        words = {token: i for token, i in model["vocab"].items() if token not in special}
        need(EOT in ids and {*words.values(), ids[EOT]} == set(range(len(words) + 1)),
             f"expected {EOT} and no other special token before the last of the ids")
        need(all(c in BYTE_OF for token in words for c in token) and all(c in words for c in BYTE_OF), "not byte-level")
        merges = [words["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
        need(merges == sorted(merges) and len(words) == 256 + len(set(merges)), "its merges are not in the order of the ids")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the tokenizer of {root} can't be read ({type(error).__name__}: {error})") from error
    ranks = dump_ranks({bytes(BYTE_OF[c] for c in token): i for token, i in words.items()})
    known = hashlib.sha256(ranks).hexdigest() == GPT2_RANKS and pattern == GPT2_SPLIT
    return {"name": "gpt2" if known else "bpe" if pattern == BPE_SPLIT else "bpe-gpt2", "ranks": ranks}


def hugging_face_bpe(pattern, **model):
    """A tokenizers.Tokenizer that splits text by the pattern, and its pieces into bytes that merge."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    bpe = Tokenizer(models.BPE(**model))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def export_tokenizer(enc, directory, max_length):
    """Write the tokenizer.json and tokenizer_config.json from which transformers' AutoTokenizer makes the same ids."""
    char = {b: c for c, b in BYTE_OF.items()}
    ranks = dict(sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))
    spelled = {token: "".join(char[b] for b in token) for token in ranks}
    # tiktoken merges any two tokens that make a third; here each such pair is named
    merges = [(spelled[token[:i]], spelled[token[i:]]) for token in ranks for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    bpe = hugging_face_bpe(enc._pat_str, vocab={spelled[token]: i for token, i in ranks.items()} | {EOT: enc.eot_token},
                           merges=merges)
    bpe.add_special_tokens([EOT])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT,
                "model_max_length": max_length, "clean_up_tokenization_spaces": False}
    (Path(directory) / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE on an iterator of str. vocab_size counts the 256 bytes, the merges and EOT."""
    from tokenizers import trainers
    bpe = hugging_face_bpe(BPE_SPLIT)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=list(BYTE_OF),
                                                       show_progress=False))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork: from now on without
    return make_encoding("bpe", {bytes(BYTE_OF[c] for c in token): rank for token, rank in bpe.get_vocab().items()})
