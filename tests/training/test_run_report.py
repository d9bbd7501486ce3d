"""report.md tells of a run what its log has, on a page that Markdown shows as it was meant.

    python -m pytest tests/training/test_run_report.py
"""

import json

import pytest
import torch
from conftest import TINY, flags, run

from gptlib.common import duration
from gptlib.distributed import World
from gptlib.training.console import Console
from gptlib.training.report_page import code_block, format_report, table, thin_out
from gptlib.training.run_log import RunLog

FACTS = dict(
    config=dict(max_steps=4, total_batch_size=100, sample_prompt="a | b",
                n_layer=1, n_head=2, n_embd=8, block_size=16, optimizer="adamw", max_lr=1e-3,
                min_lr=1e-4, data_root="data"),
    command="python train_gpt2.py --sample_prompt 'a | b'", parameters=1234, vocab_size=64,
    git_commit=None, torch="2.13.0", device="NVIDIA H100", dtype="torch.bfloat16", world_size=8,
    time="2026-11-21T10:00:00+0000", gpt2_tokens=True, fineweb_edu=True)


def write_run(log, steps, elapsed=10.0):
    """Steps of 100 tokens in 2 seconds each, an evaluation at every second one."""
    for step in steps:
        if step % 2 == 0:
            log.write(step, "val", loss=6.0 - step, bpb=2.0, elapsed=elapsed * step)
            log.write(step, "hella", acc_norm=0.25 + step / 100, acc=0.2, elapsed=elapsed * step)
            log.note(step, "samples", texts=[f"text {step}", f"another {step}"])
        log.write(step, "train", loss=5.0 - step, norm=1.0, ms=2000.0, tokens_per_second=50.0,
                  mfu=0.4, elapsed=elapsed * (step + 1))


def read_report(folder):
    return (folder / "report.md").read_text()


def row_of(text, name):
    """The cells of the table's row that begins with `name`."""
    found = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    assert len(found) == 1, f"{len(found)} rows begin with {name!r}"
    return [cell.strip() for cell in found[0].strip("|").split("|")]


@pytest.fixture
def finished(tmp_path):
    """The report of a run that went through all its steps."""
    log = RunLog(tmp_path, None, FACTS)
    write_run(log, range(4))
    log.write(4, "val", loss=2.5, bpb=1.5, elapsed=40.0)
    log.note(4, "end", elapsed=50.0)
    log.write_report()
    return read_report(tmp_path)


@pytest.mark.parametrize("row, cells", [
    ("validation loss, best", ["2.5000", "4", "3.2924 on FineWeb-Edu"]),
    ("HellaSwag, acc_norm", ["0.2700", "2", "0.2945", "0.337"]),
    ("4 | 400", ["400", "2.5000", "2.5000", "1.5000", "", "40 s"]),  # mean of 3.0 and 2.0
    ("2 | 200", ["200", "4.5000", "4.0000", "2.0000", "0.2700", "20 s"]),
    ("time, evaluations", ["50 s"]),
    ("time in training steps", ["8 s"]),
    ("throughput", ["50 tokens a second"]),
    ("model FLOPs", ["40.0%"]),
    ("machine", ["8 x NVIDIA H100, bfloat16"]),
    ("model | 1,234", ["1,234 parameters: 1 layers, 2 heads, width 8, context 16, vocabulary 64"]),
])
def test_figures_of_a_run(finished, row, cells):
    """Guards against a figure in the wrong row, of the wrong step or in the wrong unit."""
    assert row_of(finished, row)[1:len(cells) + 1] == cells


def test_what_a_finished_run_says(finished):
    """Guards against a report that does not tell whether the run is over, and how to run it
    again."""
    assert "Finished: step 4 of 4, 400 tokens." in finished
    assert "![training and validation loss](log.png)" in finished
    assert FACTS["command"] in finished
    assert "was never resumed, and no update was skipped" in finished


def test_time_and_stops_of_a_resumed_run(tmp_path):
    """Guards against a report without the time of steps that were lost, which cost money too."""
    with RunLog(tmp_path, None, FACTS) as log:
        write_run(log, range(3))  # 30 seconds, then killed
    with RunLog(tmp_path, 2, {**FACTS, "time": "later"}) as log:
        log.write(2, "train", loss=3.0, norm=float("nan"), ms=2000.0, tokens_per_second=50.0,
                  mfu=None, elapsed=15.0)
        log.note(3, "end", elapsed=20.0)
        log.write_report()
    text = read_report(tmp_path)
    assert row_of(text, "time, evaluations")[1] == "50 s"
    assert "Stopped: step 3 of 4, 300 tokens." in text
    assert "- Resumed at step 2 (later)." in text
    assert "- Skipped 1 updates whose gradient was not finite, at steps 2." in text

    with RunLog(tmp_path, 3, FACTS) as log:  # it goes on: it is not stopped any more
        log.write(3, "train", loss=3.0, norm=1.0, ms=2000.0, tokens_per_second=50.0, mfu=None,
                  elapsed=5.0)
        log.write_report()
    text = read_report(tmp_path)
    assert "Running: step 3 of 4" in text
    assert row_of(text, "time, evaluations")[1] == "55 s"


def test_each_session_counts_with_its_own_batch(tmp_path):
    """Guards against tokens that are counted with the batch of another session: two steps of 100
    tokens and two of 200 are 600."""
    with RunLog(tmp_path, None, FACTS) as log:
        write_run(log, range(2))
    config = {**FACTS["config"], "total_batch_size": 200}
    with RunLog(tmp_path, 2, {**FACTS, "config": config, "command": "the second"}) as log:
        log.write(2, "val", loss=4.0, bpb=1.0, elapsed=4.0)
        log.write(4, "val", loss=3.0, bpb=1.0, elapsed=9.0)
        log.note(4, "end", elapsed=10.0)
        log.write_report()
    text = read_report(tmp_path)
    assert "Finished: step 4 of 4, 600 tokens." in text
    assert row_of(text, "2 | 200")[6] == "24 s"
    assert row_of(text, "4 | 600")[6] == "29 s"
    assert f"{FACTS['command']}\nthe second\n" in text


def test_a_run_that_ended_by_an_error_says_so(tmp_path):
    """Guards against `Running` in the report of a run that is over."""
    nan = torch.tensor(float("nan"))
    log = RunLog(tmp_path, None, FACTS)
    with pytest.raises(ValueError, match="the disk is full"):
        with Console(log, torch.device("cpu"), World(), 4, 100, 1) as console:
            console.validation(0, 7.5)
            console.step_begins()
            console.step_ended(0, nan, 0.1, nan)
            console.validation(1, float("nan"))
            raise ValueError("the disk is full")
    text = read_report(tmp_path)
    assert "Ended by an error: step 1 of 4, 100 tokens. the disk is full" in text
    assert row_of(text, "validation loss, best")[1:3] == ["7.5000", "0"]
    assert row_of(text, "validation loss, last")[1:3] == ["not finite", "1"]
    assert "- Skipped 1 updates" in text


def test_a_resume_of_a_log_without_its_first_record(tmp_path):
    """Guards against a run that can't be resumed since the disk was full when it began."""
    with RunLog(tmp_path, None, FACTS) as log:
        write_run(log, range(2))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with RunLog(tmp_path, 2, FACTS) as log:
        log.write_report()
    assert row_of(read_report(tmp_path), "time, evaluations")[1] == "20 s"


def test_a_run_of_another_tokenizer(tmp_path):
    """Guards against GPT-2's losses beside those of a run of other tokens."""
    log = RunLog(tmp_path, None, {**FACTS, "gpt2_tokens": False})
    write_run(log, range(3))
    log.write_report()
    assert "OpenAI" not in read_report(tmp_path)


def test_a_log_that_has_no_step_yet(tmp_path):
    """Guards against a mean of nothing at the first evaluation, which comes before the first
    step."""
    log = RunLog(tmp_path, None, {"config": FACTS["config"], **FACTS})
    log.write_report()
    assert "Running: step 0 of 4, 0 tokens." in read_report(tmp_path)


def test_a_full_disk_keeps_the_last_report(tmp_path, monkeypatch):
    """Guards against half a report on a full disk, or a run that ends there."""
    log = RunLog(tmp_path, None, FACTS)
    (tmp_path / "report.md").write_text("before")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    log.write_report()
    assert read_report(tmp_path) == "before"


def test_a_log_that_could_not_be_written(tmp_path):
    """Guards against a run that ends since a disk that was full from the beginning has no first
    record."""
    log = RunLog(tmp_path, None, FACTS)
    (tmp_path / "log.jsonl").write_text("")
    log.write_report()
    assert not (tmp_path / "report.md").exists()


TRICKY = "```python\n| a | b |\n````\n<h1>big</h1>"


def test_markdown_shows_samples_and_cells_as_they_are(tmp_path):
    """Guards against a sample whose backticks end its block, and a bar that adds a column.

    markdown-it is the parser that reads the page here; its tables and fences are GitHub's.
    """
    markdown_it = pytest.importorskip("markdown_it")
    log = RunLog(tmp_path, None, {**FACTS, "data": "a | b"})
    log.note(2, "samples", texts=[TRICKY])
    log.write_report()
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(read_report(tmp_path))
    blocks = [token.content for token in tokens if token.type == "fence"]
    assert TRICKY + "\n" in blocks
    cells = [token.content for token in tokens if token.type == "inline"]
    assert "a | b" in cells
    headings = [cell.content for token, cell in zip(tokens, tokens[1:], strict=False)
                if token.type == "heading_open"]
    assert headings == [f"Training run {tmp_path.name}", "Results", "Evaluations", "Samples",
                        "How to run it again", "Time", "Stops and skipped updates"]


def test_durations_in_words():
    """Guards against 60 s where a minute is meant, also if rounding makes it so."""
    shown = [duration(seconds) for seconds in (None, 0.4, 59.6, 185, 3599.7, 7625, 302400)]
    assert shown == ["", "0 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min", "3.5 days"]


def test_a_long_run_is_thinned_out():
    """Guards against a table of a thousand evaluations, and one without the first or the last."""
    assert thin_out(list(range(1000)), 5) == [0, 250, 500, 749, 999]
    assert thin_out([1, 2], 5) == [1, 2]


def test_the_helpers_for_markdown():
    """Guards against a fence that is no longer than a run of backticks in what it holds."""
    assert code_block("a") == "```text\na\n```"
    assert code_block("a ```` b").splitlines()[0] == "`````text"
    assert table(["a"], [["b|c\nd"]]) == "| a |\n| --- |\n| b\\|c d |"


def test_a_real_run_leaves_its_report(data_root, tmp_path):
    """Guards against a report that training itself does not write, or not across a resume."""
    for max_steps in (5, 7):
        settings = {**TINY, "max_steps": max_steps, "eval_interval": 2}
        done = run("train_gpt2.py", "--data_root=data", "--auto_resume", *flags(**settings),
                   cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    text = read_report(tmp_path / "log")
    records = [json.loads(line) for line in (tmp_path / "log/log.jsonl").read_text().splitlines()]
    assert "Finished: step 7 of 7, 1,792 tokens." in text
    assert "- Resumed at step 5" in text
    assert "--max_steps=7" in text
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "val"}
    assert row_of(text, "validation loss, last")[1:3] == [f"{losses[7]:.4f}", "7"]
    samples = [r for r in records if r["kind"] == "samples"]
    assert [r["step"] for r in samples] == [2, 4, 5, 6, 7]
    assert samples[-1]["texts"][0] in text
    assert text == format_report(records, "log")
