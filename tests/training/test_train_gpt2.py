"""The model, the order of data and the training step, each against something independent.

    python -m pytest tests/training/test_train_gpt2.py
"""

import copy
import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, flags, read_log, run
from torch.nn import functional as F

import train_gpt2
from gptlib.common import UserError
from gptlib.inference.kv_cache import KVCache
from gptlib.training import parallel
from gptlib.training.console import Console
from gptlib.training.evaluation import Evaluator
from stepping import take_step
from gptlib.data.loader import TokenLoader
from gptlib.checkpoints.start import Start
from gptlib.inference.sampling import sample_next
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizers, generate, get_lr
from train_gpt2 import train
from gptlib.data.tokenizer import load_tokenizer, tokenizer_to_dict

CPU, NO_AUTOCAST = torch.device("cpu"), torch.autocast("cpu", enabled=False)
SHAPES = [  # block_size, vocab_size, n_layer, n_head, n_embd
    (16, 61, 1, 1, 8),
    (64, 257, 3, 4, 48),
    (128, 1000, 2, 12, 96),
]


def hugging_face_twin(model):
    """transformers' GPT-2 with the weights of ours, copied by the names that both share."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    linear = ("c_proj.weight", "c_attn.weight", "c_fc.weight")  # transposed there
    ours = model.state_dict()
    with torch.no_grad():
        for name, p in hf.state_dict().items():
            p.copy_(ours[name].t() if name.endswith(linear) else ours[name])
    return hf.eval()


def scrambled(config, seed=0):
    """A model whose every parameter is random, biases and norms included: zeros and ones would
    hide a missing term."""
    torch.manual_seed(seed)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


# -----------------------------------------------------------------------------
# the model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_loss_equal_hugging_face(shape):
    """Guards against a model that is not GPT-2: logits and loss are compared with transformers'."""
    model = scrambled(GPTConfig(*shape))
    hf = hugging_face_twin(model)
    idx = torch.randint(shape[1], (3, shape[0]))
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    theirs = hf(idx, labels=idx)
    torch.testing.assert_close(logits, theirs.logits[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)


def test_state_dict_has_hugging_faces_names_and_a_tied_head():
    """Guards against names that no other program can load, and a head that is not tied."""
    model = GPT(GPTConfig(*SHAPES[1]))
    assert set(model.state_dict()) == set(hugging_face_twin(model).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_weights_follow_gpt2():
    """Guards against an initialisation with another spread than GPT-2's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=1024, n_layer=8, n_head=4, n_embd=128))
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    block = model.transformer.h[3]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert block.mlp.c_fc.bias.abs().max() == 0
    loss = model(torch.randint(1024, (4, 256)), torch.randint(1024, (4, 256)))[1]
    assert loss.item() == pytest.approx(math.log(1024), rel=0.02)  # it knows nothing yet


def test_gpt2_124m_has_as_many_parameters_as_published():
    """Guards against a layer too many or too few."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_targets_of_minus_one_do_not_count():
    """Guards against padding that contributes to the loss."""
    model = scrambled(GPTConfig(*SHAPES[1]))
    idx = torch.randint(257, (2, 10))
    targets = torch.randint(257, (2, 10))
    logits, _ = model(idx)
    expected = F.cross_entropy(logits[0, :4], targets[0, :4])
    targets[0, 4:] = targets[1] = -1
    torch.testing.assert_close(model(idx, targets)[1], expected)


def test_a_cache_gives_the_same_logits_as_the_whole_sequence():
    """Guards against a KV cache that changes what the model says."""
    model = scrambled(GPTConfig(*SHAPES[1]))
    idx = torch.randint(257, (2, 20))
    whole, _ = model(idx)
    cache = KVCache.of_model(model, slots=2, size=32)
    pos = torch.arange(20).expand(2, 20)
    for a, b in ((0, 7), (7, 8), (8, 9), (9, 20)):  # a prefill, two single tokens, several at once
        part = model.lm_head(model.hidden(idx[:, a:b], cache.at(pos[:, a:b])))
        torch.testing.assert_close(part, whole[:, a:b], rtol=1e-4, atol=1e-4)


def test_a_cache_keeps_sequences_of_different_lengths_apart():
    """Guards against slots that attend to each other, or to what an earlier sequence left."""
    model = scrambled(GPTConfig(*SHAPES[1]))
    long, short = torch.randint(257, (1, 12)), torch.randint(257, (1, 5))
    cache = KVCache.of_model(model, slots=2, size=16)
    padded = torch.cat((long, F.pad(short, (0, 7), value=1)))
    model.hidden(padded, cache.at(torch.arange(12).expand(2, 12)))
    new = torch.tensor([[3], [4]])
    # overwrites the padding behind `short`
    logits = model.lm_head(model.hidden(new, cache.at(torch.tensor([[12], [5]]))))
    for row, prompt in enumerate((long, short)):
        alone, _ = model(torch.cat((prompt, new[row:row + 1]), dim=1))
        torch.testing.assert_close(logits[row, 0], alone[0, -1], rtol=1e-4, atol=1e-4)


def test_a_sequence_beyond_the_block_size_is_refused():
    """Guards against an index error deep inside the embedding."""
    with pytest.raises(ValueError, match="17 tokens is longer than the model's block size 16"):
        GPT(GPTConfig(*SHAPES[0]))(torch.zeros(1, 17, dtype=torch.long))


def test_sampling_follows_the_definitions():
    """Guards against draws that don't follow temperature, top-k and top-p."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def assert_drawn(*expected, **how):
        drawn = sample_next(logits, generator=generator, **how).view(-1)
        frequencies = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(frequencies, torch.tensor(expected), atol=0.03, rtol=0)

    assert sample_next(logits, temperature=0)[:, 0].tolist() == [0] * 4000
    assert_drawn(0.5, 0.25, 0.15, 0.1)
    assert_drawn(2 / 3, 1 / 3, 0, 0, top_k=2)
    assert_drawn(2 / 3, 1 / 3, 0, 0, top_p=0.75)
    assert_drawn(0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, top_p=0.76)
    squares = [0.25, 0.0625, 0.0225, 0.01]
    assert_drawn(*(square / sum(squares) for square in squares), temperature=0.5)


def test_greedy_generation_equals_the_uncached_model():
    """Guards against a cached `generate` that differs from the plain loop, or draws padding."""
    model = scrambled(GPTConfig(*SHAPES[1]))
    idx = torch.randint(200, (2, 5))
    expected = idx
    for _ in range(30):
        logits, _ = model(expected)
        expected = torch.cat((expected, logits[:, -1, :200].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, idx, 30, n_vocab=200, temperature=0), expected)
    assert generate(model, idx, 59, n_vocab=3).max() < 200
    assert generate(model, idx, 59, n_vocab=3)[:, 5:].max() < 3


# -----------------------------------------------------------------------------
# the training step


def test_ten_adamw_steps_equal_a_plain_loop(tmp_path, data_root):
    """Guards against a step that is not the papers' recipe: accumulate, clip, AdamW with decoupled
    decay on matrices alone."""
    settings = {**TINY, "max_steps": 10, "warmup_steps": 4, "max_lr": 3e-3}
    cfg = TrainConfig(**settings, data_root=str(data_root), log_dir=str(tmp_path / "log"))
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(32, 320, 2, 2, 32))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    shards = [np.load(path) for path in sorted(data_root.glob("*_train_*"))]
    tokens = np.concatenate(shards).astype(np.int64)
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    losses = []
    for step in range(10):
        chunk = torch.from_numpy(tokens[step * 256:step * 256 + 257])
        loss = F.cross_entropy(model(chunk[:-1].view(8, 32))[0].view(256, -1), chunk[1:])
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        cosine = 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (step - 4) / 6)) / 2
        lr = 3e-3 * (step + 1) / 4 if step < 4 else cosine
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad * min(1.0, 1.0 / (norm + 1e-6))
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                if p.dim() >= 2:
                    p.mul_(1 - lr * 0.1)
                mean = m / (1 - 0.9 ** (step + 1))
                p.sub_(lr * mean / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    checkpoint = dict(model=start, config=dataclasses.asdict(model.config),
                      tokenizer=tiny_tokenizer(data_root))
    train(cfg, Start(checkpoint=checkpoint))
    ours = read_log(tmp_path / "log")["train"]
    assert [float(ours[s]) for s in range(10)] == pytest.approx(losses, abs=2e-5)
    saved = torch.load(tmp_path / "log" / "model_00010.pt", weights_only=True)["model"]
    for name, p in model.state_dict().items():
        torch.testing.assert_close(saved[name], p, rtol=1e-3, atol=1e-4)


def tiny_tokenizer(data_root):
    return tokenizer_to_dict(load_tokenizer(data_root))


def test_the_schedule_is_the_recipes():
    """Guards against another learning rate than the recipe's at any step."""
    cfg = TrainConfig()
    rates = [get_lr(step, cfg) for step in (0, 357, 714, 715, 9894, 19073, 30000)]
    expected = [6e-4 / 715, 6e-4 * 358 / 715, 6e-4, 6e-4, 3.3e-4, 6e-5, 6e-5]
    assert rates == pytest.approx(expected, rel=1e-3)


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    """Guards against a parameter that no optimizer updates, or that two do."""
    model = GPT(GPTConfig(*SHAPES[1]))
    adamw, muon = configure_optimizers(model, TrainConfig(optimizer="muon"), torch.device("cpu"))
    names = {id(p): n for n, p in model.named_parameters()}
    of_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    of_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert of_muon == {name for name in names.values()
                       if ".h." in name and name.endswith("weight") and ".ln" not in name}
    assert of_adamw == set(names.values()) - of_muon
    decayed = {names[id(p)] for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


def first_step(**settings):
    """How far the first step moves each weight, over the learning rate: {name: tensor}."""
    cfg = TrainConfig(weight_decay=0.0, total_batch_size=64, **settings)
    model = scrambled(GPTConfig(32, 320, 2, 2, 32)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))
    batch = (tokens[:, :-1], tokens[:, 1:], 64)
    take_step(model, [batch], configure_optimizers(model, cfg, CPU),
              torch.amp.GradScaler("cpu", enabled=False), NO_AUTOCAST, 1e-3, cfg)
    return {name: (p.detach() - before[name]).abs() / 1e-3 for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_embeddings_learn_at_a_rate_of_their_own(optimizer):
    """Guards against a ratio that the embeddings do not get, or that other weights get too.

    Adam's first step moves each weight by the learning rate, whatever its gradient: here by 1, in
    units of that rate, and by 4 for the embeddings. Rows that no token uses have a gradient from
    the head.
    """
    moved = first_step(embedding_lr_ratio=4.0, optimizer=optimizer)
    for name, change in moved.items():
        if optimizer == "muon" and ".h." in name and change.dim() == 2:
            continue  # Muon's
        expected = 4.0 if name in ("transformer.wte.weight", "transformer.wpe.weight") else 1.0
        assert change.median().item() == pytest.approx(expected, rel=0.01), name


def test_optimizer_state_saved_in_other_groups_is_restored():
    """Guards against checkpoints from before --embedding_lr_ratio, whose embeddings were in one
    group with the layers, and against state that comes back to another parameter."""
    model = GPT(GPTConfig(*SHAPES[1]))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    trained, = configure_optimizers(model, TrainConfig(), CPU)
    trained.step()
    saved = trained.state_dict()
    embeddings, layers, vectors = saved["param_groups"]
    merged = {**layers, "params": embeddings["params"] + layers["params"]}
    saved["param_groups"] = [merged, vectors]

    resumed, = configure_optimizers(model, TrainConfig(embedding_lr_ratio=2.0), CPU)
    start = Start(optimizer=[saved], resumed=True)
    start.restore([resumed], torch.amp.GradScaler("cpu", enabled=False), CPU, 0)
    for name, p in model.named_parameters():
        assert torch.equal(resumed.state[p]["exp_avg"], trained.state[p]["exp_avg"]), name
    assert [group["lr_ratio"] for group in resumed.param_groups] == [2.0, 1.0, 1.0]


def test_validation_is_the_mean_over_the_first_tokens(data_root):
    """Guards against a validation loss that depends on batches: it is summed up by hand."""
    model = scrambled(GPTConfig(32, 320, 2, 2, 32))
    loader = TokenLoader(data_root, "val", 32)
    tokens = torch.from_numpy(np.load(next(data_root.glob("*_val_*"))).astype(np.int64))
    with torch.no_grad():
        total = sum(F.cross_entropy(model(tokens[None, a:min(a + 32, 1499)])[0][0],
                                    tokens[a + 1:min(a + 33, 1500)], reduction="sum").item()
                    for a in range(0, 1499, 32))

    def evaluate(n_tokens, batch_size):
        evaluator = Evaluator(model, CPU, NO_AUTOCAST, batch_size=batch_size)
        return evaluator.validation_loss(loader, n_tokens)

    whole = evaluate(10**9, 4)
    assert whole == pytest.approx(total / 1499, rel=1e-6)
    assert evaluate(10**9, 7) == pytest.approx(whole, rel=1e-6)
    with torch.no_grad():
        first = F.cross_entropy(model(tokens[None, :32])[0][0], tokens[1:33]).item()
    assert evaluate(32, 4) == pytest.approx(first, rel=1e-6)


def test_a_run_learns_and_logs_and_samples(tmp_path, data_root):
    """Guards against a run that doesn't learn, or whose log lacks steps."""
    settings = {**TINY, "max_steps": 40, "num_samples": 2}
    done = run("train_gpt2.py", *flags(**settings, data_root=data_root), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "log")
    assert sorted(log["train"]) == list(range(40))
    assert sorted(log["val"]) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert float(log["val"][0]) == pytest.approx(math.log(320), abs=0.2)
    assert float(log["val"][40]) < 2.5
    lines = (tmp_path / "log" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["kind"] == "config"
    assert records[0]["config"]["max_steps"] == 40
    assert records[0]["torch"]
    val = [r for r in records if r["kind"] == "val"][-1]
    n_bytes = (np.load(next(data_root.glob("*val*"))) != 256).sum()
    assert val["bpb"] == pytest.approx(val["loss"] / math.log(2) * 1500 / n_bytes)
    assert done.stdout.count("sample: the ") == 16
    assert (tmp_path / "log" / "log.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "log" / "latest_checkpoint.pt").resolve().name == "model_00040.pt"


def test_a_sample_prompt_that_cannot_be_encoded_is_one_line(tmp_path, data_root):
    """Guards against a panic of the tokenizer, which is no Exception, at the first samples."""
    settings = {**TINY, "max_steps": 1, "num_samples": 1, "sample_prompt": " " * 1_040_000}
    cfg = TrainConfig(**settings,
                      data_root=str(data_root), log_dir=str(tmp_path / "log"))
    with pytest.raises(UserError, match="the tokenizer cannot encode this text"):
        train(cfg)


def test_a_model_trained_in_bfloat16_or_with_muon_learns_too(tmp_path, data_root):
    """Guards against a precision or an optimizer that trains nothing."""
    for settings in (dict(dtype="bfloat16"), dict(optimizer="muon"), dict(dtype="float16")):
        cfg = TrainConfig(**{**TINY, **settings, "max_steps": 30, "eval_interval": 30},
                          data_root=str(data_root), log_dir=str(tmp_path / "log"))
        assert train(cfg) < 3.0, settings


def test_a_run_past_its_end_ends_at_once(tmp_path, data_root, monkeypatch, capsys):
    """Guards against a resumed run that never meets its last step, trains on, and prunes the good
    checkpoints of the finished run."""
    def start(*more):
        settings = {**TINY, "max_steps": 4, "checkpoint_interval": 1, "eval_interval": 10,
                    "keep_checkpoints": 2, "data_root": data_root, "log_dir": tmp_path / "log"}
        monkeypatch.setattr("sys.argv", ["train_gpt2.py", *flags(**settings), *more])
        train_gpt2.main()
        return {p.name: p.read_bytes() for p in sorted((tmp_path / "log").iterdir())}

    finished = start()
    assert {"model_00003.pt", "model_00004.pt"} <= set(finished)
    checkpoint = f"--checkpoint_path={tmp_path / 'log' / 'model_00004.pt'}"
    for more in (["--auto_resume", "--max_steps=2"], ["--auto_resume"],
                 ["--resume", checkpoint, "--max_steps=3"]):
        capsys.readouterr()
        assert start(*more) == finished, more
        assert "nothing to do: at step 4, --max_steps is" in capsys.readouterr().out, more


def test_derived_settings_are_derived_again(tmp_path, data_root, monkeypatch):
    """Guards against a run of 2 steps that is continued to 20 with the warm-up of 2, and against a
    smaller rate that is refused because of a lowest rate that nobody set."""
    def start(*more, **settings):
        monkeypatch.setattr("sys.argv", ["train_gpt2.py", *flags(**settings, data_root=data_root),
                                         f"--log_dir={tmp_path / 'log'}", *more])
        train_gpt2.main()
        lines = (tmp_path / "log" / "log.jsonl").read_text().splitlines()
        starts = [r for r in map(json.loads, lines) if r["kind"] in ("config", "resume")]
        return starts[-1]["config"]

    first = {**TINY, "warmup_steps": 10, "eval_interval": 10, "num_samples": 0, "max_steps": 2}
    assert start(**first)["warmup_steps"] == 2
    config = start("--auto_resume", max_steps=4, max_lr=1e-4)
    assert config["warmup_steps"] == 4
    assert config["min_lr"] == pytest.approx(1e-5)
    saved = torch.load(tmp_path / "log" / "model_00004.pt", weights_only=True)["train_config"]
    assert saved["warmup_steps"] == 10
    assert saved["min_lr"] is None


def test_evaluation_and_samples_work_beside_a_compiled_model(tmp_path, data_root):
    """Guards against torch.compile that gets in the way of evaluation or samples, or changes the
    losses."""
    losses = {}
    for compiled in (False, True):
        settings = {**TINY, "compile": compiled, "max_steps": 4, "eval_interval": 2,
                    "log_dir": f"log_{compiled}"}
        done = run("train_gpt2.py", *flags(**settings, data_root=data_root), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if "torch.compile does not work here" in done.stdout:
            pytest.skip("no working C++ compiler")
        assert done.stdout.count("sample: the ") == 2
        log = read_log(tmp_path / f"log_{compiled}")
        losses[compiled] = [float(v) for kind in ("train", "val") for v in log[kind].values()]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


def test_without_a_compiler_training_warns_once_and_goes_on(tmp_path, data_root, monkeypatch):
    """Guards against a run that ends where no compiler is installed; and against torch's folder
    for compiled code, whose name anybody can foresee: its optimizers write that name into the
    environment, as if the user had chosen it.
    """
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    settings = {**TINY, "compile": True, "max_steps": 2}
    done = run("train_gpt2.py", *flags(**settings, data_root=data_root), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile does not work here") == 1
    assert list(tmp_path.glob("gpt2_compiled_*/inductor")), "the compiler's folder is ours"
    assert len(read_log(tmp_path / "log")["train"]) == 2


def test_non_finite_gradients_are_skipped_and_ten_stop_the_run(tmp_path, data_root):
    """Guards against weights of NaN, and a run that goes on with nothing but skipped updates."""
    settings = {**TINY, "max_lr": 1e30, "min_lr": 0.0, "max_steps": 40, "eval_interval": 1000,
                "checkpoint_interval": 1}
    done = run("train_gpt2.py", *flags(**settings, data_root=data_root), cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout.count("the update is skipped") == 10
    assert "the gradient norm was not finite ten steps in a row" in done.stderr

# -----------------------------------------------------------------------------
# the training step: scaling, signals, compiling


@pytest.mark.parametrize("saved_scale,expected", [(None, 65536.0), (128.0, 128.0)])
def test_float16_resumes_with_and_without_a_scaler_state(saved_scale, expected):
    """Guards against a run in bfloat16, whose scaler state is {}, that can't be resumed in float16.
    """
    def scaler(enabled, scale=65536.0):
        made = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        made.scale(torch.ones(1))
        return made

    saved = scaler(saved_scale is not None, saved_scale or 65536.0).state_dict()
    assert bool(saved) == (saved_scale is not None)
    resumed = scaler(True)
    start = Start(scaler=saved, resumed=True)
    start.restore([], resumed, CPU, 0)
    assert resumed.get_scale() == expected
    # and the other way: float32 ignores the state of a float16 run
    start.restore([], scaler(False), CPU, 0)


def test_a_step_given_up_changes_nothing():
    """Guards against half a step that leaves gradients, or moves the weights or their moments."""
    cfg = TrainConfig(**{**TINY, "total_batch_size": 96})
    model = GPT(GPTConfig(*SHAPES[1]))
    optimizers = configure_optimizers(model, cfg, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    idx = torch.randint(257, (3, 33))
    micro_batches = [(row[None, :-1], row[None, 1:], 32) for row in idx]
    autocast = torch.autocast("cpu", enabled=False)

    def step(interrupted):
        return take_step(model, micro_batches, optimizers, scaler, autocast, 1e-3, cfg,
                                    interrupted=interrupted)

    assert step(lambda: False) is not None
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    moments = copy.deepcopy(optimizers[0].state_dict())
    assert step(lambda: True) is None
    assert {p.grad for p in model.parameters()} == {None}
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizers[0].state_dict(), moments, rtol=0, atol=0)


def test_no_evaluation_begins_after_a_signal(tmp_path, data_root, monkeypatch):
    """Guards against a signal that is obeyed only after an evaluation of minutes, when the host is
    gone."""
    evaluated = []

    def record(*args):
        evaluated.append(True)
        return 1.0

    def signal_at_step_2(reporter, step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Evaluator, "validation_loss", record)
    monkeypatch.setattr(Console, "_report", signal_at_step_2)
    cfg = TrainConfig(**{**TINY, "eval_interval": 1, "num_samples": 0}, data_root=str(data_root),
                      log_dir=str(tmp_path / "log"))
    train(cfg)
    assert len(evaluated) == 3  # before the steps 0, 1 and 2
    assert (tmp_path / "log" / "model_00003.pt").exists()


def test_a_step_interrupted_by_sigterm_is_repeated_exactly(tmp_path, data_root, monkeypatch):
    """Guards against dropout's random numbers of the given-up step that are lost, or its tokens
    that are skipped."""
    settings = {**TINY, "dropout": 0.2, "batch_size": 1, "max_steps": 6, "num_samples": 0,
                "auto_resume": True}
    forward = GPT.forward
    state = dict(calls=0, kill_at=None)

    def counted(model, idx, targets=None, *args, **settings):
        if model.training and targets is not None:
            state["calls"] += 1
            if state["calls"] == state["kill_at"]:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, idx, targets, *args, **settings)

    monkeypatch.setattr(GPT, "forward", counted)

    def run_train(log_dir, kill_at=None):
        state.update(calls=0, kill_at=kill_at)
        argv = ["train_gpt2.py", *flags(**settings, data_root=data_root, log_dir=log_dir)]
        monkeypatch.setattr("sys.argv", argv)
        train_gpt2.main()
        return state["calls"]

    assert run_train(tmp_path / "undisturbed") == 6 * 8
    assert run_train(tmp_path / "stopped", kill_at=3 * 8 + 4) == 3 * 8 + 4  # given up in step 3
    assert (tmp_path / "stopped" / "model_00003.pt").exists()
    run_train(tmp_path / "stopped")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "undisturbed")
    ours, theirs = (torch.load(tmp_path / name / "model_00006.pt", weights_only=True)["model"]
                    for name in ("stopped", "undisturbed"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("return_logits", [False, True])
def test_training_has_no_gradient_for_the_logits(return_logits):
    """Guards against a compiled backward pass that reads a gradient of zeros as large as the
    logits: gigabytes."""
    from torch._dynamo.backends.common import aot_autograd
    inputs = []

    def keep(graph, example_inputs):
        return graph

    def record(graph, example_inputs):
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        inputs.extend((name, tuple(getattr(value, "shape", ())))
                      for name, value in zip(names, example_inputs, strict=True))
        return graph

    torch._dynamo.reset()
    model = GPT(GPTConfig(16, 61, 1, 1, 8))
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=record))
    idx = torch.randint(61, (2, 16))
    compiled(idx, idx, return_logits=return_logits)[1].backward()
    tangents = [shape for name, shape in inputs if name.startswith("tangents")]
    assert () in tangents, inputs  # the loss has one
    assert ((2, 16, 61) in tangents) == return_logits


def test_a_short_micro_batch_leaves_the_full_one_static(tmp_path, data_root, monkeypatch):
    """Guards against a second shape that makes torch.compile recompile for any shape, which is
    slower ever after."""
    dynamic = []  # for each graph whether it has a size that varies
    compile_with = torch.compile

    def backend(graph, example_inputs):
        dynamic.append(any(isinstance(value, torch.SymInt) for value in example_inputs))
        return graph

    def compile_model(model, device, **options):
        return compile_with(model, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(parallel, "compile_model", compile_model)
    settings = {**TINY, "compile": True, "batch_size": 5, "max_steps": 3, "num_samples": 0}
    train(TrainConfig(**settings, data_root=str(data_root), log_dir=str(tmp_path / "log")))
    assert dynamic == [False, False]  # 5 rows and 3 rows of 8; later steps compile nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_run_on_a_gpu_learns(tmp_path, data_root):
    """Guards against training that only works on a CPU."""
    on_cuda = {**TINY, "device": "cuda", "dtype": "auto", "max_steps": 30}
    for settings in (dict(compile=False), dict(compile=True), dict(dtype="float16", compile=False)):
        cfg = TrainConfig(**{**on_cuda, **settings}, data_root=str(data_root),
                          log_dir=str(tmp_path / "log"))
        assert train(cfg) < 3.0, settings
