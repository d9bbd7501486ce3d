"""Named sets of train_gpt2.py's flags, for --preset: the demo, and the sizes of GPT-2 and GPT-3."""

import math

from gptlib.common import UserError


def model_preset(n_layer, n_head, n_embd, max_lr, total_batch_size, batch_size, block_size=1024):
    """The settings of a model size, with 10B tokens and GPT-3's warm-up of 375M tokens."""
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, max_lr=max_lr, block_size=block_size,
                total_batch_size=total_batch_size, batch_size=batch_size,
                max_steps=10 * 10**9 // total_batch_size,
                warmup_steps=375 * 10**6 // total_batch_size)


def default_max_lr(optimizer, n_embd):
    """The default learning rate: the recipe's for AdamW, for Muon one that depends on the width.

    Muon's rate for GPT-2 (124M) is that of modded-nanogpt's record of 2024-10-10, in the scale of
    torch.optim.Muon. The spectral norm of its updates is proportional to the rate and to
    sqrt(width), and should be the same at any width (arXiv:2310.17813). See docs/learning.md.
    """
    return 1.8e-3 * math.sqrt(768 / n_embd) if optimizer == "muon" else 6e-4


DEMO_VOCAB_SIZE = 2048

PRESETS = {
    # Two to three minutes on two CPU cores, chosen by experiment (see docs/questions.md). Compiling
    # it would take longer than it saves.
    "demo": dict(n_layer=3, n_head=3, n_embd=192, block_size=128, data_root="demo_data",
                 shuffle=True, total_batch_size=2048, batch_size=16, max_steps=1000,
                 warmup_steps=50, max_lr=8e-3, min_lr=0.0, optimizer="muon", compile=False,
                 eval_interval=250, val_tokens=131072, hellaswag_examples=0, num_samples=2,
                 sample_prompt="def", sample_length=128, sample_temperature=0.5, log_interval=50,
                 checkpoint_interval=250, keep_checkpoints=2),
    # The four sizes of GPT-2. Its paper has no learning rates: these are GPT-3's, nearest in size.
    "gpt2": model_preset(12, 12, 768, 6e-4, 2**19, 64),
    "gpt2-medium": model_preset(24, 16, 1024, 3e-4, 2**19, 32),
    "gpt2-large": model_preset(36, 20, 1280, 2.5e-4, 2**19, 16),
    "gpt2-xl": model_preset(48, 25, 1600, 2e-4, 2**20, 8),
    # GPT-3, table 2.1 of arXiv:2005.14165. Two of its rows don't multiply out: XL has 24 heads of
    # 128 for a width of 2048 (here 16 heads), 13B a width of 5140 for 40 heads of 128 (here 5120).
    "gpt3-small": model_preset(12, 12, 768, 6e-4, 2**19, 32, 2048),
    "gpt3-medium": model_preset(24, 16, 1024, 3e-4, 2**19, 16, 2048),
    "gpt3-large": model_preset(24, 16, 1536, 2.5e-4, 2**19, 8, 2048),
    "gpt3-xl": model_preset(24, 16, 2048, 2e-4, 2**20, 8, 2048),
    "gpt3-2.7b": model_preset(32, 32, 2560, 1.6e-4, 2**20, 4, 2048),
    "gpt3-6.7b": model_preset(32, 32, 4096, 1.2e-4, 2**21, 2, 2048),
    "gpt3-13b": model_preset(40, 40, 5120, 1e-4, 2**21, 1, 2048),
    "gpt3-175b": model_preset(96, 96, 12288, 6e-5, 3 * 2**20, 1, 2048),
}


def preset_settings(given):
    """The settings of the preset among the given flags, {} if there is none.

    Raises UserError for an unknown preset.
    """
    name = given.get("preset", "")
    if name and name not in PRESETS:
        raise UserError(f"--preset is {name!r}: choose one of {', '.join(PRESETS)}")
    settings = dict(PRESETS.get(name, {}))
    optimizer = given.get("optimizer")
    if optimizer and optimizer != settings.get("optimizer", "adamw"):
        settings.pop("max_lr", None)  # it belongs to the other optimizer, and each has a default
    return settings
