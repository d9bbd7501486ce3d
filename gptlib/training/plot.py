"""log.png: the curves of a run beside the published GPT-2 and GPT-3 figures."""

import contextlib

from gptlib.common import UserError, atomic_write

# which value is drawn of each kind of record
CURVES = {"train": "loss", "val": "loss", "hella": "acc_norm"}

GPT2_VAL_LOSS = 3.2924  # OpenAI's GPT-2 (124M) on the validation split of FineWeb-Edu
GPT2_HELLASWAG = 0.2945
GPT3_HELLASWAG = 0.337  # GPT-3 paper (arXiv:2005.14165), appendix H, its smallest model


def plot(records, path, gpt2_tokens):
    """Draw the records of log.jsonl as an image at `path`; a full disk leaves the image that was
    there.

    gpt2_tokens: whether losses are a GPT-2 token each, so that the published ones can be compared
    with.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, val, hella = (select_curve(records, kind) for kind in CURVES)
    has_hella = len(hella[0]) > 0
    columns = 2 if has_hella else 1
    figure, axes = plt.subplots(1, columns, figsize=(13 if has_hella else 7, 4.5), squeeze=False)
    plot_loss(axes[0][0], train, val, gpt2_tokens)
    if has_hella:
        plot_hellaswag(axes[0][1], hella, gpt2_tokens)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    with contextlib.suppress(UserError):  # the next evaluation tries again
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def select_curve(records, kind):
    """(steps, values) of the records of a kind; a value that was not finite is left out."""
    name = CURVES[kind]
    points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r[name] is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_loss(ax, train, val, gpt2_tokens):
    label = f"val {val[1][-1]:.4f}" if val[1] else "val"
    ax.plot(*train, lw=0.8, alpha=0.6, label="train")
    ax.plot(*val, marker=".", label=label)
    ax.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    if gpt2_tokens:
        label = "OpenAI GPT-2 (124M) on FineWeb-Edu val"
        ax.axhline(GPT2_VAL_LOSS, color="r", ls="--", lw=1, label=label)


def plot_hellaswag(ax, hella, gpt2_tokens):
    ax.plot(*hella, marker=".", label=f"this run {hella[1][-1]:.4f}")
    ax.set(xlabel="step", ylabel="acc_norm", title="HellaSwag")
    if gpt2_tokens:
        ax.axhline(GPT2_HELLASWAG, color="r", ls="--", lw=1, label="OpenAI GPT-2 (124M)")
        ax.axhline(GPT3_HELLASWAG, color="g", ls="--", lw=1, label="OpenAI GPT-3 (124M)")
