"""Files of a dataset on the Hugging Face Hub: which there are, and how they are fetched."""

import contextlib
import os
import random
import shutil
import threading
import time
import urllib.parse
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from gptlib.common import UserError, first_line, warn
from gptlib.data.shards import is_relative_path

FILES_AHEAD = 2  # files that are fetched while one is read
FOOTERS_AHEAD = 8  # footers that are read at a time to skip finished files
MAX_TRIES = 10  # with the waits between them, about six minutes
LONGEST_WAIT = 60  # seconds between two tries
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that may pass by themselves


def find_parquet_files(dataset, name, revision=None):
    """The files of a dataset's train split, in the order in which `datasets` reads them.

    dataset: a name on the Hub, or a local directory of the same layout. Returns (revision, files):
    the commit and paths within the repository; or (None, local paths). Returns None if one of
    them is no parquet file.
    """
    from datasets import load_dataset_builder
    builder = load_dataset_builder(dataset, name=name, revision=revision)
    files = [str(path) for path in (builder.config.data_files or {}).get("train", [])]
    if not files or not all(path.endswith(".parquet") for path in files):
        return None
    prefix = f"hf://datasets/{dataset}@"
    if all(path.startswith(prefix) for path in files):
        parts = [path.removeprefix(prefix).partition("/") for path in files]
        return urllib.parse.unquote(parts[0][0]), [path for _, _, path in parts]
    if all(os.path.isfile(path) for path in files):
        return None, files
    return None


def list_files(dataset, revision=None):
    """The commit of a dataset on the Hub, and {path: size in bytes} of its files."""
    from huggingface_hub import HfApi
    api = HfApi()
    commit = api.dataset_info(dataset, revision=revision).sha
    entries = api.list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
    return commit, {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


class HubFiles:
    """Files of one commit of a dataset on the Hub.

    folder: files are downloaded into it, and removed when they are read. None keeps them in
    Hugging Face's own cache.
    """

    def __init__(self, dataset, revision, folder=None):
        self.dataset, self.revision, self.folder = dataset, revision, folder

    def fetch(self, path):
        """Download a file, or what is missing of it. Returns the local path."""
        from huggingface_hub import hf_hub_download
        if not is_relative_path(path):  # it would be written outside of the folder
            raise UserError(f"dataset {self.dataset} has a file {path!r}: not a path within it")
        return with_retries(path, lambda: hf_hub_download(
            self.dataset, path, repo_type="dataset", revision=self.revision,
            local_dir=self.folder))

    def drop(self, local_path):
        """Remove a file that was fetched, unless it is to be kept."""
        if self.folder:
            Path(local_path).unlink(missing_ok=True)

    def drop_all(self):
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def count_rows(self, path):
        """The number of rows of a file, of which only the footer is read."""
        import pyarrow.parquet
        from huggingface_hub import HfFileSystem

        def read_footer():
            # without a cache: pyarrow itself asks for the last 64 KB, and for more only if needed
            with HfFileSystem().open(f"datasets/{self.dataset}/{path}", revision=self.revision,
                                     cache_type="none") as f:
                return pyarrow.parquet.read_metadata(f).num_rows
        return with_retries(path, read_footer)


@contextlib.contextmanager
def hub_errors(dataset):
    """Turn any error of another package into a UserError that names the dataset."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the Hub, the network, a damaged file: dozens of classes
        raise UserError(f"cannot read dataset {dataset}: {type(error).__name__}: "
                        f"{first_line(error)}. Finished shards are kept: repair it and run the "
                        "same command again") from error


def with_retries(path, work):
    """Do work() again while the network or the server fails, at growing intervals."""
    for number in range(1, MAX_TRIES + 1):
        try:
            return work()
        except Exception as error:  # the network and the server fail in dozens of classes
            is_ending = not threading.main_thread().is_alive()  # then all connections break
            if number == MAX_TRIES or is_ending or not may_pass(error):
                raise
            wait = seconds_to_wait(error, number)
            warn(f"{path}: {first_line(error)}; trying again in {wait:.0f} s")
            time.sleep(wait)


def may_pass(error):
    """Whether an error may be gone at the next try: one of the network, or of a busy server."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    if isinstance(error, LocalEntryNotFoundError):
        return True  # what huggingface_hub raises if there was no connection
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in TEMPORARY
    if isinstance(error, UserError):
        return False
    is_of_network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")
    # An OSError of the disk has a number; that of a download of the wrong size has none.
    is_of_disk = isinstance(error, OSError) and error.errno is not None
    is_connection = isinstance(error, ConnectionError | TimeoutError)
    return is_of_network or is_connection or (isinstance(error, OSError) and not is_of_disk)


def seconds_to_wait(error, number):
    """How long to wait after try `number`: as the server says, else twice as long each time."""
    response = getattr(error, "response", None)
    asked_for = response.headers.get("Retry-After", "") if response is not None else ""
    if asked_for.isdigit():
        return min(int(asked_for), 5 * LONGEST_WAIT)
    # at random, so that many machines do not come back at the same time
    return min(2 ** (number - 1), LONGEST_WAIT) * random.uniform(0.5, 1)


def fetch_ahead(fetch, names, ahead):
    """Yield fetch(name) of each name, in order; threads fetch the next `ahead` meanwhile.

    Daemon threads, so that Ctrl-C does not wait for the end of a download.
    """
    running, names = deque(), iter(names)

    def start():
        for name in names:
            future = Future()
            thread = threading.Thread(target=run, args=(future, fetch, name), daemon=True)
            thread.start()
            running.append(future)
            return

    for _ in range(1 + ahead):
        start()
    while running:
        yield running.popleft().result()
        start()


def run(future, function, argument):
    try:
        future.set_result(function(argument))
    except BaseException as error:  # it is raised where the result is asked for
        future.set_exception(error)
