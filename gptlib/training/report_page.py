"""report.md: what a run did and how it went, on one page that GitHub renders.

The page is made of the records of log.jsonl alone, so it covers the whole run, however often that
was stopped and resumed.
"""

import re
import statistics

from gptlib.common import duration

GPT2_VAL_LOSS = 3.2924  # OpenAI's GPT-2 (124M) on the validation split of FineWeb-Edu
GPT2_HELLASWAG = 0.2945
GPT3_HELLASWAG = 0.337  # GPT-3 paper (arXiv:2005.14165), appendix H, its smallest model

MAX_ROWS = 25  # of the table of evaluations
MAX_SAMPLES = 6  # evaluations whose samples are shown


def format_report(records, title):
    """The report of a run as Markdown.

    records: all of log.jsonl, in order. title: the name of the run, such as its folder.
    """
    sessions = [r for r in records if r["kind"] in ("config", "resume")]
    facts = sessions[-1]
    config = facts["config"]
    timed = count_from_the_beginning(records)
    of_kind = {kind: [r for r in timed if r["kind"] == kind]
               for kind in ("train", "val", "hella", "samples", "end")}
    commands = dict.fromkeys(r.get("command") or "unknown" for r in sessions)
    parts = [
        f"# Training run {title}",
        describe_progress(of_kind, sessions),
        "![training and validation loss](log.png)",
        "## Results", results_table(of_kind, facts),
        "## Evaluations", evaluations_table(of_kind, sessions),
        "## Samples", show_samples(of_kind["samples"], config),
        "## How to run it again", code_block("\n".join(commands)),
        facts_table(facts, config, sessions[0]["time"]),
        "## Time", time_table(of_kind["train"], run_seconds(records)),
        "## Stops and skipped updates", describe_incidents(sessions, of_kind["train"]),
    ]
    return "\n\n".join(parts) + "\n"


# -----------------------------------------------------------------------------
# the sections


def describe_progress(of_kind, sessions):
    """Whether the run is over, and how far it came."""
    max_steps = sessions[-1]["config"]["max_steps"]
    last = max((r["step"] for records in of_kind.values() for r in records), default=0)
    done = of_kind["end"][-1]["step"] if of_kind["end"] else last
    share = f"step {done:,} of {max_steps:,}, {tokens_until(done, sessions):,} tokens"
    error = of_kind["end"][-1].get("error") if of_kind["end"] else None
    if error:
        return f"Ended by an error: {share}. {error}"
    if done == max_steps:
        return f"Finished: {share}."
    if of_kind["end"] and done >= last:
        return f"Stopped: {share}. `--auto_resume` goes on."
    return f"Running: {share}."


def results_table(of_kind, facts):
    """Best and last validation loss, and HellaSwag, beside the published models."""
    evaluated = "dev split" if facts["config"].get("dev") else "validation"
    published = facts.get("gpt2_tokens")
    columns = ["this run", "at step"]
    if published:
        columns += ["OpenAI GPT-2 (124M)", "OpenAI GPT-3 (124M)"]
    rows = []
    losses = [r for r in of_kind["val"] if r["loss"] is not None]
    if losses:
        best, last = min(losses, key=lambda r: r["loss"]), of_kind["val"][-1]
        known = f"{GPT2_VAL_LOSS} on FineWeb-Edu" if facts.get("fineweb_edu") else ""
        others = [known, ""] if published else []
        for name, record in (("best", best), ("last", last)):
            rows.append([f"{evaluated} loss, {name}", number(record["loss"]) or "not finite",
                         record["step"], *others])
        if "bpb" in last:
            rows.append([f"{evaluated}, bits per byte, last", number(last["bpb"]) or "not finite",
                         last["step"], *["" for _ in others]])
    if of_kind["hella"]:
        record = of_kind["hella"][-1]
        others = [GPT2_HELLASWAG, GPT3_HELLASWAG] if published else []
        rows.append(["HellaSwag, acc_norm", f"{record['acc_norm']:.4f}", record["step"], *others])
    else:
        rows.append(["HellaSwag", "not evaluated", "", *(["", ""] if published else [])])
    return table(["", *columns], rows)


def evaluations_table(of_kind, sessions):
    """Validation loss over the run, with the mean training loss since the evaluation before."""
    hella = {r["step"]: r["acc_norm"] for r in of_kind["hella"]}
    rows, begin = [], 0
    for record in of_kind["val"]:
        step = record["step"]
        since = [r["loss"] for r in of_kind["train"]
                 if begin <= r["step"] < step and r["loss"] is not None]
        rows.append([f"{step:,}", f"{tokens_until(step, sessions):,}",
                     f"{statistics.mean(since):.4f}" if since else "", number(record["loss"]),
                     number(record.get("bpb")), number(hella.get(step)),
                     duration(record.get("elapsed"))])
        begin = step
    columns = ["step", "tokens", "training loss", "validation loss", "bits per byte", "HellaSwag",
               "time"]
    return table(columns, thin_out(rows, MAX_ROWS))


def show_samples(records, config):
    """What the model wrote at some of the evaluations, the last one included."""
    if not records:
        return "None were asked for."
    parts = [f"They continue {code_span(config['sample_prompt'])}."]
    chosen = thin_out(records, MAX_SAMPLES)
    for record in chosen:
        parts.append(f"At step {record['step']:,}:")
        texts = record["texts"] if record is chosen[-1] else record["texts"][:1]
        parts += [code_block(text) for text in texts]
    return "\n\n".join(parts)


def facts_table(facts, config, begun):
    """Machine, software, data and model."""
    machine = f"{facts['world_size']} x {facts['device']}, {facts['dtype'].removeprefix('torch.')}"
    rows = [
        ["machine", ", ".join(filter(None, [machine, facts.get("machine")]))],
        ["software", f"torch {facts['torch']}, commit {facts['git_commit'] or 'unknown'}"],
        ["data", facts.get("data") or config["data_root"]],
        ["model", f"{facts['parameters']:,} parameters: {config['n_layer']} layers, "
                  f"{config['n_head']} heads, width {config['n_embd']}, context "
                  f"{config['block_size']}, vocabulary {facts['vocab_size']:,}"],
        ["training", f"{config['optimizer']}, rate {config['max_lr']:g} to {config['min_lr']:g}, "
                     f"{config['total_batch_size']:,} tokens a step"],
        ["started", begun],
    ]
    return table(["", ""], rows)


def time_table(train, seconds):
    """Wall-clock time, throughput, MFU and memory."""
    rows = [["time, evaluations and lost work included", duration(seconds)],
            ["time in training steps", duration(sum(r["ms"] for r in train) / 1000)]]
    if train:
        rates = [r["tokens_per_second"] for r in train]
        rows.append(["throughput, median of the steps",
                     f"{statistics.median(rates):,.0f} tokens a second"])
        mfu = [r["mfu"] for r in train if r.get("mfu") is not None]
        rows.append(["model FLOPs utilization (MFU), median",
                     f"{statistics.median(mfu):.1%}" if mfu else "unknown for this device"])
        memory = [r["memory_mib"] for r in train if r.get("memory_mib") is not None]
        if memory:
            rows.append(["GPU memory at most", f"{max(memory):,.0f} MiB"])
    return table(["", ""], rows)


def describe_incidents(sessions, train):
    """At which steps the run was resumed, and which updates were skipped."""
    lines = []
    for record in sessions[1:]:
        lines.append(f"- Resumed at step {record['step']:,} ({record['time']}).")
    skipped = [f"{r['step']:,}" for r in train if r["norm"] is None]
    if skipped:
        shown = ", ".join(skipped[:20]) + (", ..." if len(skipped) > 20 else "")
        lines.append(f"- Skipped {len(skipped)} updates whose gradient was not finite, at steps "
                     f"{shown}.")
    return "\n".join(lines) or "None: the run was never resumed, and no update was skipped."


def run_seconds(records):
    """Seconds of all sessions of a run, with those of steps that a resume dropped."""
    times = [record.get("elapsed") for record in count_from_the_beginning(records)]
    known = [seconds for seconds in times if seconds is not None]
    return known[-1] if known else 0.0


def count_from_the_beginning(records):
    """The records, their `elapsed` counted from the beginning of the run and not of the session."""
    before, counted = 0.0, []
    for record in records:
        elapsed = record.get("elapsed")
        if record["kind"] in ("config", "resume"):
            before, elapsed = record.get("seconds_before", 0.0), 0.0
        counted.append(record if elapsed is None else {**record, "elapsed": before + elapsed})
    return counted


def tokens_until(step, sessions):
    """Tokens of the steps before `step`; a resume may have changed how many a step has."""
    ends = [session["step"] for session in sessions[1:]] + [step]
    begin, tokens = 0, 0
    for session, end in zip(sessions, ends, strict=True):
        end = min(end, step)
        tokens += max(end - begin, 0) * session["config"]["total_batch_size"]
        begin = max(begin, end)
    return tokens


# -----------------------------------------------------------------------------
# Markdown


def table(columns, rows):
    """A table. The contents of a cell can't end the cell or the row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def fence_for(text, shortest):
    """A fence of backticks, one more than the longest run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


def code_block(text):
    """The text shown as it is: samples may contain Markdown and HTML."""
    fence = fence_for(text, 3)
    return f"{fence}text\n{text}\n{fence}"


def code_span(text):
    fence = fence_for(text, 1)
    return f"{fence} {text} {fence}".replace("\n", " ")


def number(value):
    return "" if value is None else f"{value:.4f}"


def thin_out(rows, count):
    """At most `count` of the rows, evenly spaced, the first and the last included."""
    if len(rows) <= count:
        return rows
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]
