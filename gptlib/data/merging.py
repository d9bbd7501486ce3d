"""The parts of a dataset, made by several machines, are merged into one dataset."""

import os
import re
import shutil
from pathlib import Path

from gptlib.common import UserError, atomic_write
from gptlib.data.parts import Part
from gptlib.data.shards import list_shards, read_meta, write_meta
from gptlib.lock import LOCK_NAME, lock_directory


def merge_parts(data_root):
    """Make one dataset of the parts in a directory. Returns the contents of its meta.json.

    The shards are moved, not copied. If this is interrupted, run it again. Raises UserError if a
    part is missing, not complete, or made in another way than the first.
    """
    root = Path(data_root)
    folders = find_parts(root)
    meta = read_meta(root)
    if meta.get("complete") and not folders:
        raise UserError(f"{root} is complete, and holds no parts to merge")
    try:
        with lock_directory(root):
            if meta.get("complete"):  # an earlier merge was interrupted while it removed folders
                remove_folders(folders)
                return meta
            return move_parts(root, folders)
    except OSError as error:
        raise UserError(f"cannot merge the parts in {root}: {error.strerror or error} "
                        f"({error.filename}). Put all parts on one disk, and run it again"
                        ) from error


def find_parts(root):
    """The sorted folders of parts in a directory."""
    return sorted(path for path in root.glob("part_*_of_*")
                  if re.fullmatch(r"part_\d{4}_of_\d{4}", path.name) and not path.is_symlink())


def move_parts(root, folders):
    """Merge the parts in these folders. Returns the contents of the new meta.json."""
    metas = read_parts(root, folders)
    merged = merge_metas(root, folders, metas)
    tokenizer = folders[0] / "tokenizer.tiktoken"
    if tokenizer.exists():
        atomic_write(root / tokenizer.name, lambda f: f.write(tokenizer.read_bytes()))
    write_meta(root, merged | {"complete": False})  # first: no shard is here without a record
    for folder, part in zip(folders, metas, strict=True):
        for shard in part["shards"]:
            if (folder / shard["name"]).exists():
                os.replace(folder / shard["name"], root / shard["name"])
    write_meta(root, merged)
    remove_folders(folders)
    return merged


def remove_folders(folders):
    """Remove folders of parts whose shards have been moved. Raises UserError if one holds any."""
    for folder in folders:
        if list_shards(folder, "train") or list_shards(folder, "val"):
            raise UserError(f"{folder} holds shards, but the dataset around it is complete: move "
                            "the folder away, or remove it")
    for folder in folders:
        shutil.rmtree(folder)


def read_parts(root, folders):
    """The meta.json of every part, in order. Raises UserError unless all are there and complete."""
    names = [folder.name for folder in folders]
    counts = {name.rpartition("_")[2] for name in names}
    if not names:
        raise UserError(f"no parts in {root}: expected folders like {Part(1, 8).folder()}, as "
                        "python fineweb.py --part 1/8 makes them")
    if len(counts) > 1:
        raise UserError(f"{root} has parts of {' and of '.join(sorted(counts))}: remove those that "
                        "do not belong to it")
    count = int(counts.pop())
    expected = [Part(number, count).folder() for number in range(1, count + 1)]
    missing = sorted(set(expected) - set(names))
    if missing:
        raise UserError(f"{root} lacks {len(missing)} of {count} parts: {', '.join(missing[:8])}")
    metas = [read_meta(folder) for folder in folders]
    for folder, meta in zip(folders, metas, strict=True):
        if not meta.get("complete") or "settings" not in meta:
            raise UserError(f"{folder} is not complete: run its command again")
        if (folder / LOCK_NAME).exists():
            with lock_directory(folder):
                pass  # nothing writes there any more
        for shard in meta["shards"]:
            if not any((place / shard["name"]).exists() for place in (folder, root)):
                raise UserError(f"{folder} lacks {shard['name']}: run its command again")
    return metas


def recipe(folder, meta):
    """What has to be the same in all parts, as {what: value}."""
    # For a dataset on the Hub the commit counts, however --revision has named it.
    ignored = {"part", "revision"} if meta.get("hub") else {"part"}
    settings = {key: value for key, value in meta["settings"].items() if key not in ignored}
    tokenizer = folder / "tokenizer.tiktoken"
    ranks = tokenizer.read_bytes() if tokenizer.exists() else b""
    return {**settings, "contents of the tokenizer": ranks, "files on the Hub": meta.get("hub"),
            "text for the tokenizer": meta["trained_within"]}


def merge_metas(root, folders, metas):
    """The meta.json of the whole, from that of each part. Raises UserError if they differ."""
    first, *others = [recipe(folder, meta)
                      for folder, meta in zip(folders, metas, strict=True)]
    for folder, other in zip(folders[1:], others, strict=True):
        for what, value in first.items():
            if other.get(what) != value:
                raise UserError(f"{folder} was made in another way than {folders[0]}: {what} is "
                                f"{other.get(what)!r:.60}, not {value!r:.60}. Make it again")
    shards = [shard for meta in metas for shard in meta["shards"]]
    names = [shard["name"] for shard in shards]
    if len(set(names)) < len(names):
        raise UserError(f"the parts in {root} have shards of the same name: make them again")
    merged = metas[0] | {"shards": shards, "complete": True}
    merged["settings"] = merged["settings"] | {"part": None}
    for unit in ("tokens", "bytes"):
        merged[unit] = {split: sum(meta[unit][split] for meta in metas)
                        for split in ("train", "val")}
    total, shard_size = sum(merged["tokens"].values()), merged["settings"]["shard_size"]
    if total < 2 * shard_size:
        raise UserError(f"{root}: {total} tokens in all parts, less than two shards of "
                        f"{shard_size}; prepare so small a corpus without --part")
    return merged
