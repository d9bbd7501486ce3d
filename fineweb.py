r"""
Text -> tokens -> uint16 shards: the command that makes a dataset directory.

FineWeb-Edu, 10B tokens as 100 shards of the GPT-2 tokenizer (20 GB) in edu_fineweb10B/, and one of
its larger samples:
$ python fineweb.py
$ python fineweb.py --name sample-100BT --data_root edu_fineweb100B
Any other text on the Hugging Face Hub, or in a local directory of the same layout, here with a
tokenizer trained on it:
$ python fineweb.py --dataset wikimedia/wikipedia --name 20231101.ja --tokenizer bpe \
      --vocab_size 32768 --data_root ja
Your own files (.txt and .md: one document a file; .jsonl, .json.gz and .parquet: one a row), into
another folder than theirs:
$ python fineweb.py --files "books/**/*.txt" --data_root books_data
The same with the tokenizer of a checkpoint (or of another dataset, or of a Hugging Face directory),
to fine-tune that model:
$ python fineweb.py --files "books/**/*.txt" --tokenizer log/latest_checkpoint.pt \
      --data_root books_finetune
The functions of the Python standard library, about 4 MB that every installation carries:
$ python fineweb.py --source stdlib --tokenizer bpe --vocab_size 4096 --data_root stdlib
A part of a large source, here its first billion tokens as far as whole documents go:
$ python fineweb.py --max_tokens 1000000000 --data_root edu_fineweb1B
The third of eight parts, one for each machine, and how they become one dataset in the end:
$ python fineweb.py --name sample-350BT --data_root edu_fineweb350B --part 3/8
$ python fineweb.py --merge --data_root edu_fineweb350B
The first billion of FineWeb-Edu's tokens, which others have tokenized already:
$ python fineweb.py --ready fineweb-edu-100B --max_tokens 1000000000
Check that no byte of the shards has changed since they were written:
$ python fineweb.py --verify --data_root books_data

Every document begins with <|endoftext|>, an empty one too. Shard 0 is validation. A corpus smaller
than two shards is put in a seeded order first, and the last --val_fraction of its tokens is
validation. If a run is interrupted, run the same command again: it continues after the last whole
shard, and the result is the same to the byte.
"""

import contextlib
import itertools
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gptlib.common import ArgumentParser, UserError, atomic_write, print0, run_main, warn
from gptlib.config import add_flags, check_settings, setting
from gptlib.data.merging import merge_parts
from gptlib.data.parts import WHOLE, parse_part
from gptlib.data.ready import READY_SETS, fetch_ready
from gptlib.data.shard_writer import ShardWriter
from gptlib.data.shards import checksums_of, list_shards, read_meta, verify_shard
from gptlib.data.sources import FINEWEB, FINEWEB_TOKENS, open_source
from gptlib.data.tokenizer import EOT, load_tokenizer, tokenizer_to_dict, train_bpe
from gptlib.data.tokenizing import (HOLDS_EOT, count_marked, encode_batches, split_chunk,
                                    training_text, whole_documents)
from gptlib.lock import lock_directory
from gptlib.training.presets import DEMO_VOCAB_SIZE, PRESETS

# bytes: up to four of FineWeb-Edu's files, of 2.15 GB each, are on the disk at a time
DOWNLOADS = 4 * 2_150_000_000

# -----------------------------------------------------------------------------
# settings: one dataclass makes the command line, the checks, and the table in docs/data.md


@dataclass
class PrepareConfig:
    data_root: str = setting("edu_fineweb10B", "dataset directory to write")

    # where text comes from
    source: str = setting(None, "fineweb, files or stdlib (default: fineweb, or files if --files "
                          "is given)", choices=("fineweb", "files", "stdlib"), optional=True)
    files: str = setting(None, "text files, as a quoted pattern: .txt .md .jsonl .json.gz "
                         ".parquet; ** matches any folders", optional=True)
    dataset: str = setting(FINEWEB, "name on the Hugging Face Hub, or a local directory")
    name: str = setting(None, "configuration of the dataset; for FineWeb-Edu sample-10BT "
                        "(default), sample-100BT or sample-350BT", optional=True)
    column: str = setting("text", "column or key that holds the text")
    split_on: str = setting(None, "cut .txt and .md files into documents at each line that is this "
                            f"text, such as '{EOT}' (default: a file is a document)", optional=True)
    revision: str = setting(None, "commit, branch or tag of the dataset on the Hub (default: the "
                            "newest)", optional=True)
    keep_downloads: bool = setting(False, "download into Hugging Face's cache and keep the files "
                                   "there")

    # how it becomes tokens
    tokenizer: str = setting("gpt2", "gpt2; bpe, which trains one on the text; or a checkpoint, a "
                             "dataset directory or a Hugging Face directory, to use its tokenizer")
    vocab_size: int = setting(None, f"for bpe: the number of ids, {EOT} included", 257, 65536,
                              optional=True)
    pattern: str = setting(None, "for bpe: gpt2 splits text as GPT-2 does, which llama.cpp can "
                           "read from a GGUF file (default: our own, better for Chinese and "
                           "Japanese)", choices=("gpt2",), optional=True)
    num_proc: int = setting(None, "tokenizing threads; if they are more than four, each has a "
                            "process of its own (default: one per core)", 1, optional=True)

    # what is written
    max_tokens: int = setting(None, "end before the first document that would go past so many "
                              "tokens (default: no limit)", 2, optional=True)
    shard_size: int = setting(10**8, "tokens in a shard", 1)
    prefix: str = setting("edufineweb", "first part of the names of the shards")
    val_fraction: float = setting(0.1, "share of the tokens for validation, in a corpus smaller "
                                  "than two shards; below 1", above=0)
    seed: int = setting(1337, "seed of the order of documents, in a corpus smaller than two "
                        "shards", 0)
    part: str = setting(None, "prepare only part K of N of the source, written K/N, in a folder of "
                        "its own in --data_root; each machine makes another part", optional=True)

    def __post_init__(self):
        check_settings(self)
        if (self.vocab_size is not None) != (self.tokenizer == "bpe"):
            raise UserError(f"--tokenizer {self.tokenizer} --vocab_size {self.vocab_size}: a size "
                            "goes with bpe, and bpe with a size")
        if self.pattern and self.tokenizer != "bpe":
            raise UserError(f"--tokenizer {self.tokenizer} --pattern {self.pattern}: a pattern "
                            "goes with bpe")
        if self.val_fraction >= 1:
            raise UserError(f"--val_fraction is {self.val_fraction}: expected a number between 0 "
                            "and 1")
        if not self.prefix or re.search(r"_(train|val)_|[/\\]", f"{self.prefix}_"):
            raise UserError(f"--prefix is {self.prefix!r}: expected part of a file name, without "
                            "_train_ or _val_")
        # What a smaller corpus holds out depends on where it ends, and that on the tokenizer.
        two_shards = 2 * self.shard_size
        if self.max_tokens and self.tokenizer == "bpe" and self.max_tokens < two_shards:
            raise UserError(f"--max_tokens is {self.max_tokens}: expected at least two shards with "
                            f"--tokenizer bpe, {two_shards} tokens; choose a smaller --shard_size")
        if self.split_on == "":
            raise UserError("--split_on is empty: expected the text of a line, or no --split_on")
        if self.max_tokens and parse_part(self.part) != WHOLE:
            raise UserError("--max_tokens ends the whole source, so it does not go with --part")
        self.source = self.source or ("fineweb" if self.files is None else "files")
        if self.source == "fineweb" and self.dataset == FINEWEB:
            self.name = self.name or "sample-10BT"
        self.num_proc = self.num_proc or os.cpu_count()


# -----------------------------------------------------------------------------
# making a dataset


def prepare(cfg):
    """Write the shards, meta.json and tokenizer of a dataset directory, or continue after a kill.

    cfg: a PrepareConfig. Returns the contents of meta.json. Raises UserError for errors that the
    user can fix.
    """
    part = parse_part(cfg.part)
    root = Path(cfg.data_root)
    if part != WHOLE:
        if read_meta(root).get("complete"):
            raise UserError(f"{root} is a dataset already: choose another --data_root")
        root = root / part.folder()
    meta = read_meta(root)
    text = open_source(cfg.source, cfg.files, cfg.dataset, cfg.name, cfg.column, cfg.split_on,
                       revision=cfg.revision, recorded=meta.get("hub"),
                       folder=None if cfg.keep_downloads else root / "downloads")
    settings = recorded_settings(cfg, part, text)
    warn_if_mixed(text, cfg.data_root)

    # continue what an interrupted run with these settings has left, or begin
    finished_shards = find_finished_shards(root, meta)
    changed = changed_settings(meta, settings)
    if finished_shards and changed:
        raise UserError(f"{root} was made with other settings ({'; '.join(changed)}): choose "
                        f"another --data_root, or remove {our_files(root, meta)}, nothing else")
    if meta.get("complete") and len(finished_shards) == len(meta["shards"]):
        print(f"{root} is complete: {sum(meta['tokens'].values()):,} tokens in "
              f"{len(finished_shards)} shards. Nothing to do")
        return meta
    enc = None
    if changed and cfg.tokenizer != "bpe":
        enc = named_tokenizer(cfg.tokenizer)  # a wrong name shows before the directory is made
    with lock_directory(root):
        found_files = text.resolve()
        if changed:
            meta, enc = begin_dataset(root, settings, text.read, enc)
        else:
            enc = load_tokenizer(root)  # it was written before meta.json was
        meta |= found_files
        with ShardWriter(root, meta, enc, finished_shards, part) as writer:
            tell_room_needed(writer, text, cfg.max_tokens, cfg.dataset, cfg.name)
            writer.save_meta()
            write_documents(writer, enc, text, cfg.num_proc, cfg.max_tokens)
        text.close()
    print_summary(writer, root)
    return read_meta(root)


def warn_if_mixed(text, data_root):
    """Warn if the dataset directory is also the folder of the user's own texts."""
    root = Path(data_root).resolve()
    if any(Path(path).resolve().is_relative_to(root) for path in text.paths or ()):
        warn(f"{data_root} holds texts of --files, too: choose a --data_root of its own, so that "
             "nobody removes the texts with the dataset")


def our_files(root, meta):
    """The files that this program has made in a dataset directory, in words."""
    names = [shard["name"] for shard in meta["shards"]]
    shards = names[0] if len(names) == 1 else f"its {len(names)} shards {names[0]} to {names[-1]}"
    others = [name for name in ("meta.json", "tokenizer.tiktoken") if (root / name).exists()]
    return f"{shards}, {' and '.join(others)} in it"


def recorded_settings(cfg, part, text):
    """The settings that decide the contents of the dataset, as meta.json keeps them."""
    return {"source": text.description, "tokenizer": cfg.tokenizer, "vocab_size": cfg.vocab_size,
            "shard_size": cfg.shard_size, "val_fraction": cfg.val_fraction, "seed": cfg.seed,
            "prefix": cfg.prefix, "max_tokens": cfg.max_tokens, "pattern": cfg.pattern,
            "part": f"{part.number}/{part.count}" if part != WHOLE else None,
            "revision": cfg.revision}


def print_summary(writer, root):
    where_val_is = "shard 0 is validation"
    if writer.part.number > 1:
        where_val_is = "none for validation, which is in part 1"
    print("{documents:,} documents ({empty:,} empty, {repaired:,} with lone surrogates replaced): "
          "{tokens:,} tokens, {bytes:,} bytes of text".format(**writer.totals()),
          f"in {len(writer.shards)} shards, {where_val_is}, in {root}")


def find_finished_shards(root, meta):
    """The records in meta.json of the shards that are on disk, up to the first that is missing.

    Raises UserError for a directory whose shards another program made.
    """
    shards_on_disk = list_shards(root, "train") + list_shards(root, "val")
    if "settings" not in meta and shards_on_disk:
        raise UserError(f"{root} holds shards that this program did not make: choose another "
                        "--data_root")
    recorded = meta.get("shards", [])
    return list(itertools.takewhile(lambda shard: (root / shard["name"]).exists(), recorded))


def changed_settings(meta, settings):
    """How the settings in meta.json differ from these, in words; an empty meta differs in all."""
    earlier = meta.get("settings", {})
    return [f"{key} was {earlier.get(key)!r}, is {value!r}"
            for key, value in settings.items() if value != earlier.get(key)]


def begin_dataset(root, settings, read, enc):
    """Save the tokenizer in the new directory; if enc is None, train it first.

    Returns (the first contents of meta.json, the tokenizer).
    """
    trained_within = {"head": None, "tail": None}
    if enc is None:
        enc, trained_within = train_tokenizer(settings, read)
    if enc.name != "gpt2":
        ranks = tokenizer_to_dict(enc)["ranks"]
        atomic_write(root / "tokenizer.tiktoken", lambda f: f.write(ranks))
    meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot": enc.eot_token,
            "source": settings["source"], "settings": settings, "trained_within": trained_within,
            "order": None}
    return meta, enc


def train_tokenizer(settings, read):
    """Train a BPE on text of the train split.

    Returns (the tokenizer, the limits of that text as training_text returns them).
    """
    vocab_size = settings["vocab_size"]
    print(f"training a tokenizer of {vocab_size} tokens on the text")
    strings, head, tail = training_text(read, settings["shard_size"], settings["val_fraction"],
                                        settings["seed"])
    enc = train_bpe(strings, vocab_size, "bpe-gpt2" if settings["pattern"] == "gpt2" else "bpe")
    if enc.n_vocab < vocab_size:
        print(f"the text is too short for that many: {enc.n_vocab}")
    return enc, {"head": head, "tail": tail}


def named_tokenizer(name):
    """The tokenizer of "gpt2", a checkpoint file, a dataset or a Hugging Face directory."""
    spec = name
    if Path(name).is_file():
        # imported here because nothing else needs torch, which takes a second to import
        from gptlib.checkpoints.formats import load_checkpoint
        spec = load_checkpoint(name, mmap=True)["tokenizer"]
    enc = load_tokenizer(spec)
    if enc.n_vocab > 65536:
        raise UserError(f"--tokenizer {name} has {enc.n_vocab} tokens: uint16 shards hold 65536")
    return enc


def tell_room_needed(writer, text, max_tokens, dataset, name):
    """Print how much room the dataset will take, if that is known, and warn if there is less.

    It is only a warning, because the source may have fewer tokens than --max_tokens.
    """
    is_fineweb = dataset == FINEWEB and name in FINEWEB_TOKENS
    known = [max_tokens] if max_tokens else []
    if is_fineweb:
        known.append(FINEWEB_TOKENS[name] // writer.part.count)
    if not known:
        return
    root, written = writer.root, writer.totals()["tokens"]
    needed = 2 * max(0, min(known) - written)  # bytes: a token is a uint16
    free = shutil.disk_usage(root).free
    what = f"the shards take up to {needed / 1e9:.2f} GB more"
    if is_fineweb and text.keeps_downloads_in(root):
        needed += DOWNLOADS
        what += f", and downloads up to {DOWNLOADS / 1e9:.2f} GB while it runs,"
    print(f"{what} in {root}, where {free / 1e9:.2f} GB are free")
    if needed > free:
        warn("that may not fit: make room, or choose a smaller --max_tokens or another --data_root")


def write_documents(writer, enc, text, num_proc, max_tokens=None):
    """Tokenize the documents that are not in the finished shards, and write them."""
    from tqdm import tqdm
    skip, last_doc_tokens = writer.position()
    total, num_holding_eot = writer.totals()["tokens"], 0
    stream = encode_batches(enc, text.batches(skip, writer.part), num_proc)
    with (tqdm(desc="tokenizing", unit="tok", unit_scale=True, initial=total) as bar,
          contextlib.closing(stream)):
        for chunk in stream:
            if last_doc_tokens:
                # The first document begins in the last finished shard, with that many tokens.
                chunk = split_chunk(chunk, last_doc_tokens, writer.eot, writer.token_sizes)[1]
                last_doc_tokens = 0
            num_tokens = len(chunk.tokens)
            if max_tokens is not None:
                chunk = whole_documents(chunk, max_tokens - total, writer.eot, writer.token_sizes)
            total += len(chunk.tokens)
            num_holding_eot += count_marked(chunk.marks, HOLDS_EOT)
            bar.update(len(chunk.tokens))
            writer.add(chunk)
            if len(chunk.tokens) < num_tokens:
                writer.end_early()
                break
    writer.finish()
    if num_holding_eot:
        warn(f"{num_holding_eot:,} documents hold the text {EOT}, tokenized as any other text; "
             f"--split_on '{EOT}' cuts .txt and .md files into documents at lines of it")


# -----------------------------------------------------------------------------
# are the shards as they were written?


def verify_dataset(data_root, num_proc):
    """Check every shard of a dataset directory against its checksum in meta.json, in parallel.

    Prints a line for each shard that is damaged or missing, and raises UserError if there is one.
    A shard without a checksum passes if its format and length are right. num_proc: threads.
    """
    from tqdm import tqdm
    root = Path(data_root)
    meta = read_meta(root)
    checksums = checksums_of(meta)
    paths = shards_to_verify(root, meta)
    expected = [checksums.get(path.name) for path in paths]
    problems = []
    with ThreadPoolExecutor(num_proc) as pool:
        results = pool.map(find_problem, paths, expected)
        for problem in tqdm(results, desc="verifying", total=len(paths), unit="shard"):
            if problem:
                tqdm.write(problem)
                problems.append(problem)
    if problems:
        raise UserError(f"{len(problems)} of {len(paths)} shards in {root} are damaged or missing: "
                        "remove them, and make them again with the command that made the dataset")
    without = expected.count(None)
    if without:
        print(f"{without} of {len(paths)} shards have no checksum in meta.json (another program or "
              "an earlier version made them): of these, only format and length were checked")
    print(f"{root}: {len(paths)} shards, no damage found")


def find_problem(path, checksum):
    """What is wrong with a shard, in a line; None if nothing is."""
    try:
        verify_shard(path, checksum)
    except UserError as error:
        return str(error)
    return None


def shards_to_verify(root, meta):
    """Sorted paths of the shards on disk and of those that meta.json says should be there."""
    recorded = [root / shard["name"] for shard in meta.get("shards", [])]
    if recorded and not meta.get("complete"):
        print(f"{root} is not complete: the command that makes it was interrupted, or runs")
        # A shard is recorded before it is written, so the last one may not be there yet.
        if not recorded[-1].exists():
            recorded.pop()
    on_disk = list_shards(root, "val") + list_shards(root, "train")
    paths = sorted({*recorded, *on_disk})
    if not paths:
        raise UserError(f"no shards in {root}. Make them: python fineweb.py --data_root {root}")
    return paths


def make_parser():
    parser = ArgumentParser(__doc__)
    add_flags(parser, PrepareConfig)
    parser.add_argument("--ready", metavar="NAME", help="only fetch shards that others have made, "
                        f"and exit: {', '.join(READY_SETS)}, or any dataset on the Hub with such "
                        "files; as many as --max_tokens needs")
    parser.add_argument("--verify", action="store_true", help="only check the shards in "
                        "--data_root against their checksums, and exit")
    parser.add_argument("--merge", action="store_true",
                        help="only join the parts in --data_root to one dataset, and exit")
    return parser


def find_or_make_shards(data_root, is_demo, world):
    """Make the demo's dataset if there are no shards yet: rank 0 does, the others wait.

    Raises UserError if another dataset is missing.
    """
    if list_shards(data_root, "train"):
        return
    if not is_demo or data_root != PRESETS["demo"]["data_root"]:
        raise UserError(f"no shards in {data_root!r}. Make them: python fineweb.py --data_root "
                        f"{data_root}\nor see it all work on a small corpus first: "
                        "python train_gpt2.py --preset demo")
    print0(f"no shards in {data_root!r}: making some from the Python standard library of this "
           "interpreter")
    if world.rank == 0:
        prepare(PrepareConfig(data_root, source="stdlib", tokenizer="bpe",
                              vocab_size=DEMO_VOCAB_SIZE))
    from gptlib.distributed import any_rank  # loads torch, which preparing data does not need
    any_rank(False, world)  # wait for rank 0


def main():
    flags = vars(make_parser().parse_args())
    ready, merge, verify = (flags.pop(key) for key in ("ready", "merge", "verify"))
    cfg = PrepareConfig(**flags)
    if ready is not None:
        unused = flags.keys() - {"data_root", "max_tokens", "revision"}
        if unused or merge or verify:
            raise UserError("--ready goes with --data_root, --max_tokens and --revision alone")
        fetch_ready(cfg.data_root, ready, cfg.max_tokens, cfg.revision)
    elif merge:
        meta = merge_parts(cfg.data_root)
        print(f"{cfg.data_root}: {sum(meta['tokens'].values()):,} tokens in "
              f"{len(meta['shards'])} shards")
    elif verify:
        verify_dataset(cfg.data_root, cfg.num_proc)
    else:
        prepare(cfg)


if __name__ == "__main__":
    run_main(main)
