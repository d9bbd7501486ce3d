"""
Text -> tokens -> uint16 shards. Owns the tokenizer and the shard format.

FineWeb-Edu, 10B tokens as 100 shards of the GPT-2 tokenizer (20 GB) in edu_fineweb10B/; its larger samples:
$ python fineweb.py
$ python fineweb.py --name sample-100BT --data_root edu_fineweb100B
Any other text on the Hugging Face Hub, or in a local directory of the same layout, here with its own tokenizer:
$ python fineweb.py --dataset wikimedia/wikipedia --name 20231101.ja --tokenizer bpe --vocab_size 32768 --data_root ja
Your own files (.txt and .md: a document a file; .jsonl, .json.gz and .parquet: a document a row):
$ python fineweb.py --files "books/**/*.txt" --data_root books
The same with the tokenizer of a checkpoint (or of another dataset, or a Hugging Face directory), to fine-tune it:
$ python fineweb.py --files "books/**/*.txt" --tokenizer log/latest_checkpoint.pt --data_root books_for_it
The sources of the Python standard library, about 9 MB that every installation carries:
$ python fineweb.py --source stdlib --tokenizer bpe --vocab_size 4096 --data_root stdlib

Every document begins with <|endoftext|>; an empty one is nothing but that. Shard 0 is the val split. A corpus smaller
than two shards is put in a seeded order first, and the last --val_fraction of its tokens is the val split. Killed
half-way? Run the same command again: it continues after the last whole shard, and the result is the same to the byte.
"""

import argparse
import base64
import contextlib
import difflib
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
FINEWEB = "HuggingFaceFW/fineweb-edu"

# -----------------------------------------------------------------------------
# mistakes the user can mend, and files that are whole or not there


class UserError(ValueError):
    """A mistake the user can mend: what was found, what was expected, what to do next."""


def run_main(main):
    """Call main(). A UserError becomes one line on stderr and exit code 1, Ctrl-C becomes exit code 130."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose help begins with the script's docstring and whose errors are one line: a UserError."""

    def __init__(self, description, **how):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **how)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        raise UserError(message + (f" (did you mean {near[0]}?)" if near else " (see --help)"))


def atomic_write(path, write):
    """Write a file through write(f), f a binary file, so that it is whole or not there.

    Raises UserError when the disk is full or not writable; what was at `path` before is then intact.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if hasattr(os, "O_DIRECTORY"):  # POSIX: the new name is on disk when the directory is
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the one behind the other
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}. Make room or choose another place; what was "
                        "there before is intact") from error
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path):
    """A directory to write files into that takes the name `path` at the end of the block: whole or not there.

    Raises UserError where there is one already that isn't empty, or when the disk is full or not writable.
    """
    from safetensors import SafetensorError
    path = Path(os.path.abspath(path))
    tmp = path.with_name(path.name + ".tmp")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another name, or remove it")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of one that was killed
        tmp.mkdir(parents=True)
        yield tmp
        for file in tmp.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rmdir()
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Make room or choose another "
                        "place") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# -----------------------------------------------------------------------------
# the tokenizer: always a tiktoken.Encoding with one special token, <|endoftext|>; its id is the last, if it was made here

# How GPT-2 splits text into pieces: OpenAI's pattern without its possessive quantifiers, which the regex engine takes
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
    if root.is_file():
        import torch
        try:
            return torch.load(root, map_location="cpu", mmap=True, weights_only=True)["tokenizer"]
        except Exception as error:  # torch has an exception of its own for each kind of damage
            raise UserError(f"{root} has no tokenizer that can be read: give a checkpoint of this program") from error
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


# -----------------------------------------------------------------------------
# the dataset directory


def list_shards(data_root, split):
    """Sorted paths of the "train" or "val" shards of a dataset directory: .npy, or .bin as llm.c writes it."""
    return sorted(path for kind in ("npy", "bin") for path in Path(data_root).glob(f"*_{split}_*.{kind}"))


def open_shard(path):
    """Memory-map a shard as a 1-D uint16 array. Raises UserError for whatever is not a whole shard.

    A .bin has a header of 256 int32 (magic 20240520, version 1, number of tokens), then the tokens, as in llm.c.
    """
    path, tokens = Path(path), None
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
            found, expected = f"{tokens.ndim}-D {tokens.dtype}", "1-D uint16"
        else:
            header = np.fromfile(path, dtype="<i4", count=256).tolist()
            found, expected = f"header {header[:2]}, {path.stat().st_size} bytes", "llm.c's header [20240520, 1]"
            if len(header) == 256:
                expected = f"header [20240520, 1], {1024 + 2 * header[2]} bytes"
                if found == expected:
                    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(header[2],))
    except (OSError, ValueError, EOFError) as error:
        found, expected = error, "a whole shard"
    if tokens is None or tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path}: {found}; expected {expected}. Make it again with python fineweb.py (see --help)")
    return tokens


def save_shard(path, tokens):
    """Write uint16 tokens as .npy, whole or not at all."""
    def write(f):  # np.save would not say why a write fell short
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(tokens))
        f.write(tokens.data)
    atomic_write(path, write)


def read_meta(data_root):
    """The contents of meta.json as a dict, empty where there is none."""
    path = Path(data_root) / "meta.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}): remove {data_root} and make the dataset again") from error


# -----------------------------------------------------------------------------
# sources of documents


def open_source(source, files, dataset, name, column):
    """Return a description, which tells any two sources apart, and read(skip), an iterator of documents (str)."""
    if source == "fineweb":
        return f"{dataset}, {name or 'default'}, column {column}", lambda skip: read_hub(dataset, name, column, skip)
    if source == "files":
        paths = [path for path in sorted(glob.glob(os.path.expanduser(files or ""), recursive=True))
                 if os.path.isfile(path)]
        digest = hashlib.sha256(repr([(path, os.path.getsize(path)) for path in paths]).encode()).hexdigest()[:12]
        description = f"{files}, column {column}: {len(paths)} files, names and sizes {digest}"
    elif source == "stdlib":
        paths = stdlib_files()
        description = f"standard library of Python {sys.version.split()[0]}: {len(paths)} files"
    else:
        raise UserError(f"--source {source}: expected fineweb, files or stdlib")
    if not paths:
        raise UserError(f"--source {source} --files {files}: no files found; check the pattern, and quote it")
    return description, lambda skip: itertools.islice((text for path in paths for text in read_file(path, column)),
                                                      skip, None)


def stdlib_files():
    """The .py files of the standard library that are on every installation, sorted: no tests, no tables of code pages."""
    skip = {"test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "encodings", "idlelib",
            "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "msilib"}
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in skip and not name.startswith("config-")]
        found += [os.path.join(folder, name) for name in names
                  if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize"))]
    return sorted(found)


def text_of(value, column, where):
    """A document from a row: null is an empty one."""
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not text; name the text by --column")
    return value or ""


def read_file(path, column):
    """Yield the documents of a file. Raises UserError, with the line where there is one."""
    where = path
    try:
        if path.endswith((".txt", ".md", ".py")):
            yield Path(path).read_bytes().decode()
        elif path.endswith((".jsonl", ".json.gz", ".jsonl.gz")):
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict) or column not in row:
                            raise UserError(f"{where}: no {column!r} in {line[:60]!r}; name the text by --column")
                        yield text_of(row[column], column, where)
        elif path.endswith(".parquet"):
            import pyarrow.parquet
            with pyarrow.parquet.ParquetFile(path) as f:
                if column not in f.schema_arrow.names:
                    raise UserError(f"{path}: no column {column!r} in {f.schema_arrow.names}; name one by --column")
                for batch in f.iter_batches(1024, columns=[column]):
                    for text in batch[0].to_pylist():
                        yield text_of(text, column, where)
        else:
            raise UserError(f"{path}: expected .txt, .md, .jsonl, .json.gz or .parquet; narrow --files")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(f"{where}: cannot read it ({error}). Mend it, or leave it out of --files") from error


def read_hub(dataset, name, column, skip):
    """Stream the documents of a dataset on the Hub, or of a local directory of the same layout."""
    from datasets import load_dataset
    try:
        rows = load_dataset(dataset, name=name, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows), {column: ""}))
        if column not in columns:
            raise UserError(f"{dataset}: no column {column!r} in {columns}; name one by --column")
        for table in rows.select_columns([column]).skip(skip).with_format("arrow").iter(1024):
            for text in table[column].to_pylist():
                yield text_of(text, column, dataset)
    except UserError:
        raise
    except Exception as error:  # the Hub, the network, a broken file: dozens of kinds
        raise UserError(f"cannot read dataset {dataset} ({name or 'default'}): {type(error).__name__}: {error}. Whole "
                        "shards are kept: mend it and run the same command again") from error


# -----------------------------------------------------------------------------
# documents -> tokens

EMPTY, REPAIRED = 1, 2  # marks of a document
CHUNK = 2**20  # characters handed to a thread at a time


def clean(text):
    """Replace lone surrogates, which UTF-8 cannot hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_chunk(enc, texts):
    """Tokenize a list of documents. Returns their uint16 tokens, EOT before each, and a byte of marks for each."""
    try:
        if any(EOT in text for text in texts):
            raise ValueError("the separator is in the text")
        # one call for all: no Python object a token, and the interpreter lock is free while it works
        tokens = enc.encode_to_numpy(EOT.join(["", *texts]), allowed_special={EOT})
        return tokens.astype(np.uint16), bytes(EMPTY * (not text) for text in texts)
    except ValueError:  # that, or lone surrogates, or a million spaces that overflow the stack of the regex
        if len(texts) > 1:
            tokens, marks = zip(*[encode_chunk(enc, [text]) for text in texts], strict=True)
            return np.concatenate(tokens), b"".join(marks)
    text = clean(texts[0])
    parts = re.split(r"(\s{100000})", text)  # what would overflow, by itself
    tokens = [enc.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate([[enc.eot_token], *tokens]).astype(np.uint16), bytes([REPAIRED * (text != texts[0])])


def encode_stream(enc, documents, num_proc):
    """Yield encode_chunk of about CHUNK characters of documents at a time, in order, from num_proc threads.

    Threads, not processes: tiktoken works outside the interpreter lock, so no text is copied to and fro, the platform's
    way to start processes does not matter, and nothing is left behind when this one dies.
    """
    with ThreadPoolExecutor(num_proc) as pool:
        queue, texts, size = deque(), [], 0
        for text in documents:
            texts.append(text)
            size += len(text) + 1
            if size >= CHUNK:
                queue.append(pool.submit(encode_chunk, enc, texts))
                texts, size = [], 0
                if len(queue) > num_proc + 16:  # enough to bridge the writing of a shard; bounds what is in memory
                    yield queue.popleft().result()
        if texts:
            queue.append(pool.submit(encode_chunk, enc, texts))
        while queue:
            yield queue.popleft().result()


def measure(token_sizes, tokens, limit=2**63 - 1):
    """Return how many of the first tokens fit into `limit` bytes of text, and how many bytes those are."""
    fit = size = 0
    for i in range(0, len(tokens), 2**20):  # in pieces, as numpy makes an int64 of every index
        ends = size + np.cumsum(token_sizes[tokens[i:i + 2**20]], dtype=np.int64)
        k = int(np.searchsorted(ends, limit, side="right"))
        fit, size = fit + k, int(ends[k - 1]) if k else size
        if k < len(ends):
            break
    return fit, size


def training_text(read, shard_size, val_fraction, seed, most=10**8):
    """Choose up to `most` bytes to train a tokenizer on, sure to be in the train split. Returns (strings, head, tail).

    Both the split and "smaller than two shards" are counted in tokens, which do not exist yet. Of a corpus that may
    fill two shards, the first half may be val; of one that may not, the tail of the seeded order may be. What is left
    is fit to train on, and the cut made later respects it: val lies within the first `head` bytes as read, or beyond
    the first `tail` bytes of the seeded order; None where that case is ruled out.
    """
    sizes, total = [], 0
    for text in read(0):
        sizes.append(len(text) if text.isascii() else len(clean(text).encode()))
        total += sizes[-1]
        if total > 12 * shard_size:  # two shards at six bytes a token: a large corpus, whatever the tokens will be
            break
    sizes = np.array(sizes, dtype=np.int64)
    first, last, head, tail = 0 * sizes, sizes.copy(), None, None
    if total + len(sizes) >= 2 * shard_size:  # no token but EOT is without a byte, so a smaller one cannot fill them
        head = total // 2
        first = np.clip(head - (np.cumsum(sizes) - sizes), 0, sizes)
    if total <= 12 * shard_size:
        tail = int(0.95 * (1 - val_fraction) * total)  # 0.95: so that the exact cut hardly ever has to move
        order = np.random.default_rng(seed).permutation(len(sizes))
        last[order] = np.clip(tail - (np.cumsum(sizes[order]) - sizes[order]), 0, sizes[order])
    wanted = np.maximum(last - first, 0)
    last = first + np.clip(most - (np.cumsum(wanted) - wanted), 0, wanted)

    def strings():  # piece by piece, as the trainer takes many bytes for each
        for text, a, b in zip(read(0), first, last, strict=False):
            data = clean(text).encode() if a < b else b""
            yield from (data[i:min(i + 2**20, b)].decode("utf-8", "ignore") for i in range(a, b, 2**20))
    return strings(), head, tail


# -----------------------------------------------------------------------------
# the command


def prepare(data_root, source="fineweb", files=None, dataset=FINEWEB, name=None, column="text", tokenizer="gpt2",
            vocab_size=None, shard_size=10**8, val_fraction=0.1, num_proc=None, seed=1337, prefix="edufineweb"):
    """Write the shards, meta.json and tokenizer of a dataset directory, or continue where it was killed.

    source: "fineweb" (dataset, name, column: on the Hub or a local directory), "files" (files: a glob) or "stdlib".
    tokenizer: "bpe" trains one of vocab_size, anything else is for find_tokenizer. shard_size is in tokens. Returns the
    contents of meta.json; raises UserError for whatever the user can mend.
    """
    from tqdm import tqdm
    root, num_proc = Path(data_root), os.cpu_count() if num_proc is None else num_proc
    if (vocab_size is not None) != (tokenizer == "bpe"):
        raise UserError(f"--tokenizer {tokenizer} --vocab_size {vocab_size}: a size goes with bpe, and bpe with a size")
    if vocab_size is not None and not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size {vocab_size}: expected 257 (the bytes and {EOT}) to 65536 (uint16 shards)")
    if shard_size < 1 or num_proc < 1 or not 0 < val_fraction < 1:
        raise UserError(f"--shard_size {shard_size} --num_proc {num_proc} --val_fraction {val_fraction}: expected at "
                        "least 1, at least 1, and between 0 and 1")
    if not prefix or re.search(r"_(train|val)_|[/\\]", f"{prefix}_"):
        raise UserError(f"--prefix {prefix!r}: expected part of a file name, without _train_ or _val_")
    if source == "fineweb" and dataset == FINEWEB:
        name = name or "sample-10BT"
    description, read = open_source(source, files, dataset, name, column)

    # what is here already?
    settings = {"source": description, "tokenizer": tokenizer, "vocab_size": vocab_size, "shard_size": shard_size,
                "val_fraction": val_fraction, "seed": seed, "prefix": prefix}
    meta = read_meta(root)
    if "settings" not in meta and list_shards(root, "train") + list_shards(root, "val"):
        raise UserError(f"{root} holds shards that this program did not make: choose another --data_root")
    there = list(itertools.takewhile(lambda shard: (root / shard["name"]).exists(), meta.get("shards", [])))
    old = meta.get("settings", {})
    changed = [f"{key} was {old.get(key)!r}, is {now!r}" for key, now in settings.items() if now != old.get(key)]
    if there and changed:
        raise UserError(f"{root} was made otherwise ({'; '.join(changed)}): remove it or choose another --data_root")
    if meta.get("complete") and len(there) == len(meta["shards"]):
        print(f"{root} is complete: {sum(meta['tokens'].values()):,} tokens in {len(there)} shards. Nothing to do")
        return meta
    fresh = not old or changed  # else the tokenizer is there: meta.json is written after it
    enc = load_tokenizer(tokenizer if fresh else root) if tokenizer != "bpe" or not fresh else None
    if enc and enc.n_vocab > 65536:
        raise UserError(f"--tokenizer {tokenizer} has {enc.n_vocab} tokens: uint16 shards hold 65536")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {root} ({error.strerror}): choose another --data_root") from error

    if fresh:
        head = tail = None
        if tokenizer == "bpe":
            print(f"training a tokenizer of {vocab_size} tokens on the text")
            strings, head, tail = training_text(read, shard_size, val_fraction, seed)
            enc = train_bpe(strings, vocab_size)
            if enc.n_vocab < vocab_size:
                print(f"the text is too short for that many: {enc.n_vocab}")
        if enc.name != "gpt2":
            atomic_write(root / "tokenizer.tiktoken", lambda f: f.write(dump_ranks(enc._mergeable_ranks)))
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token, "source": description,
                "settings": settings, "trained_within": {"head": head, "tail": tail}, "order": None}
    else:
        head, tail = meta["trained_within"].values()
    token_sizes = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)], dtype=np.uint16)
    token_sizes[enc.eot_token] = 0

    # a large corpus continues after its last whole shard; a small one, at most two shards, is tokenized again
    shards = there if meta["order"] == "as read" else []
    large = bool(shards) or (head is not None and tail is None)
    skip, begun = (sum(shard["documents"] for shard in shards) - 1, shards[-1]["begun"]) if shards else (0, 0)
    held, count, marks = [], 0, bytearray()

    def save_meta(complete=False):
        for unit in ("tokens", "bytes"):
            meta[unit] = {split: sum(shard[unit] for shard in shards if f"_{split}_" in shard["name"])
                          for split in ("train", "val")}
        text = json.dumps(meta | {"shards": shards, "complete": complete}, indent=2, ensure_ascii=False) + "\n"
        atomic_write(root / "meta.json", lambda f: f.write(text.encode()))

    def write_shards(tokens, least, val_size=shard_size):
        """Write shards while there are `least` tokens; returns the others."""
        while len(tokens) >= least:
            size = shard_size if shards else val_size
            if not shards and large and head is not None:  # the tokenizer may have seen what follows
                size = max(1, min(size, measure(token_sizes, tokens, head)[0]))
            shard, tokens = tokens[:size], tokens[size:]
            starts = np.flatnonzero(shard == enc.eot_token)
            n, before = len(starts), shards[-1]["begun"] if shards else 0
            shards.append({"name": f"{prefix}_{'train' if shards else 'val'}_{len(shards):06d}.npy",
                           "tokens": len(shard), "bytes": measure(token_sizes, shard)[1],
                           "documents": n, "empty": marks.count(EMPTY, 0, n), "repaired": marks.count(REPAIRED, 0, n),
                           # tokens so far of the last document: where a run that continues takes it up
                           "begun": len(shard) - int(starts[-1]) if n else before + len(shard)})
            del marks[:n]
            save_meta()  # before the shard: one that is there is always accounted for
            path = root / shards[-1]["name"]
            if not path.exists():
                save_shard(path, shard)
        return tokens

    save_meta()
    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, initial=sum(meta["tokens"].values())) as bar:
        for tokens, chunk_marks in encode_stream(enc, read(skip), num_proc):
            if begun:  # the last document of the last shard, of which that much is there
                tokens, chunk_marks, begun = tokens[begun:], chunk_marks[1:], 0
            held.append(tokens)
            marks += chunk_marks
            count += len(tokens)
            bar.update(len(tokens))
            if count >= shard_size * (1 if large and shards else 2):
                large, meta["order"] = True, "as read"
                tokens = write_shards(np.concatenate(held), shard_size)
                held, count = [tokens.copy()], len(tokens)  # a copy: the slice would keep the shards in memory
    tokens = np.concatenate([np.empty(0, np.uint16), *held])
    if large:
        meta["order"] = "as read"
        write_shards(tokens, 1)
    else:
        meta["order"] = "seeded"
        if len(tokens) < 2:
            raise UserError(f"{description}: {len(tokens)} tokens in all, too few for two splits")
        documents = np.split(tokens, np.flatnonzero(tokens == enc.eot_token)[1:])
        order = np.random.default_rng(seed).permutation(len(documents))
        tokens = np.concatenate([documents[i] for i in order])
        cut = len(tokens) - round(val_fraction * len(tokens))
        if tail is not None:  # forward to the end of the token that ends what the tokenizer has seen
            cut = max(cut, measure(token_sizes, tokens, tail - 1)[0] + 1)
        cut = min(max(cut, 1), len(tokens) - 1)  # something for either split
        n = np.count_nonzero(tokens[:cut] == enc.eot_token)
        marks = bytearray(marks[i] for i in [*order[n:], *order[:n]])
        write_shards(np.concatenate([tokens[cut:], tokens[:cut]]), 1, val_size=len(tokens) - cut)
    save_meta(complete=True)
    total = {key: sum(shard[key] for shard in shards) for key in ("documents", "empty", "repaired", "tokens", "bytes")}
    print("{documents:,} documents ({empty:,} empty, {repaired:,} with lone surrogates replaced): {tokens:,} tokens, "
          "{bytes:,} bytes of text".format(**total), f"in {len(shards)} shards, the first is val, in {root}")
    return read_meta(root)


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_root", default="edu_fineweb10B", help="dataset directory to write")
    add("--source", choices=["fineweb", "files", "stdlib"], help="default: fineweb, or files where --files is given")
    add("--files", metavar="GLOB", help="text files, quoted: .txt .md .jsonl .json.gz .parquet; ** means any folders")
    add("--dataset", default=FINEWEB, help="name on the Hugging Face Hub, or a local directory")
    add("--name", help="its configuration; of FineWeb-Edu sample-10BT (default), sample-100BT or sample-350BT")
    add("--column", default="text", help="column or key that holds the text")
    add("--tokenizer", default="gpt2", help="gpt2; bpe: train one on the text; or a checkpoint, a dataset directory, a "
        "Hugging Face directory: the tokenizer of that (default: gpt2)")
    add("--vocab_size", type=int, help="of bpe, with its <|endoftext|>: 257 to 65536")
    add("--shard_size", type=int, default=10**8, help="tokens in a shard")
    add("--val_fraction", type=float, default=0.1, help="held out of a corpus smaller than two shards")
    add("--num_proc", type=int, help="tokenizing threads; default: one a core")
    add("--seed", type=int, default=1337, help="of the order of documents of a corpus smaller than two shards")
    add("--prefix", default="edufineweb", help="begins the names of the shards")
    args = vars(parser.parse_args())
    args["source"] = args["source"] or ("fineweb" if args["files"] is None else "files")
    prepare(**args)


if __name__ == "__main__":
    run_main(main)
