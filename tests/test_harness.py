"""EleutherAI's lm-evaluation-harness reads the log-likelihoods of hellaswag.py: from an export,
and from serve.py.

    pip install "lm_eval[hf,api]==0.4.13" && python -m pytest tests/test_harness.py
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, load_gpt2_or_skip
from serving_helpers import run_server
from test_scoring import FLOAT32, made_examples, make_model

from gptlib.training import scoring

pytestmark = [pytest.mark.timeout(1800), pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")]
# the harness takes a text of digits alone for a number
EXAMPLES = [{**example, "ctx": f"then {example['ctx']}"} for example in made_examples(50, seed=3)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "always-ends"])
def export(request, tmp_path_factory):
    """A model and its export; `always-ends` finds <|endoftext|> likeliest everywhere."""
    tokenizer = load_gpt2_or_skip()
    model = make_model(tokenizer, std=0.1, block_size=256)
    if request.param:
        with torch.no_grad():
            model.transformer.wte.weight[tokenizer.eot_token] *= 10
            model.transformer.ln_f.bias += 2 * model.transformer.wte.weight[tokenizer.eot_token]
    home = tmp_path_factory.mktemp("harness")
    model.save_pretrained(home / "my_gpt2", tokenizer)
    (home / "hellaswag").mkdir()
    lines = [json.dumps(example) for example in EXAMPLES]
    (home / "hellaswag" / "hellaswag_val.jsonl").write_text("\n".join(lines))
    return model.eval(), tokenizer, home


def check_harness(export, *args):
    """Run docs/hellaswag_local.yaml, and compare each sum and both accuracies with our scorer."""
    model, tokenizer, home = export
    shutil.rmtree(home / "out", ignore_errors=True)
    command = [sys.executable, "-m", "lm_eval", *args, "--tasks=hellaswag_local",
               f"--include_path={ROOT / 'docs'}", "--log_samples", "--output_path=out"]
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=str(home / "cache"))
    done = subprocess.run(command, cwd=home, env={**environment(), **offline},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    [path] = home.glob("out/**/samples_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda s: s["doc_id"])
    found = [[float(value) for value, _ in sample["filtered_resps"]] for sample in samples]
    rows = [scoring.encode(example, tokenizer) for example in EXAMPLES]
    losses = scoring.ending_losses(model, rows)
    expected = [[-sum(ending) for ending in endings] for endings in losses]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)

    [path] = home.glob("out/**/results_*.json")
    results = json.loads(path.read_text())["results"]["hellaswag_local"]
    scores = scoring.evaluate(model, EXAMPLES, tokenizer, FLOAT32)
    assert results["acc,none"] == pytest.approx(scores["acc"])
    assert results["acc_norm,none"] == pytest.approx(scores["acc_norm_chars"])


def test_of_an_export(export):
    """Guards against figures that are not those of public tables."""
    check_harness(export, "--model=hf", "--model_args=pretrained=my_gpt2,dtype=float32",
                  "--device=cpu", "--batch_size=8")


def test_of_a_server(export):
    """Guards against log-probabilities that the harness reads one token late, or one too few."""
    with run_server(export[2], MODEL_CHECKPOINT="my_gpt2", SLOTS="8", QUEUE_SIZE="64") as server:
        server.ready()
        check_harness(export, "--model=local-completions", "--batch_size=4",
                      f"--model_args=model=my_gpt2,base_url={server.url}/v1/completions,"
                      "tokenizer=my_gpt2,max_length=256,num_concurrent=4")
