"""The share of a model's samples that are Python."""

import codeop
import warnings

from gptlib.common import log
from gptlib.inference.sampling import SamplingParams
from inference import load_for_sampling, make_engine, start_samples

SAMPLE_TOKENS = 200
TEMPERATURES = (0.0, 0.4, 0.6, 0.8, 1.0)


def judge_python(text, is_cut):
    """Python's verdict on a sample: "compiles", "unfinished" or "wrong".

    is_cut: whether the sample was cut off at its length, so that its last line is not to be judged.
    A text is unfinished if it is right so far and its end alone is missing: an open bracket, string
    or block.
    """
    if is_cut:
        text = text[:text.rfind("\n") + 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as "invalid escape sequence"
        try:
            compile(text, "sample", "exec")
            return "compiles"
        except (SyntaxError, ValueError):  # ValueError: a null byte
            pass
        try:
            code = codeop.compile_command(text, "sample", "exec")
        except (SyntaxError, ValueError, OverflowError):
            return "wrong"
    return "unfinished" if code is None else "compiles"


def bench_samples(args):
    """Shares of --num_samples samples of 200 tokens, at several temperatures."""
    loaded = load_for_sampling(args.checkpoint_path, args.device)
    prompt = loaded.sample_prompt
    log(f"\n{args.num_samples} samples of up to {SAMPLE_TOKENS} tokens that continue {prompt!r}")
    results = []
    for temperature in TEMPERATURES:
        count = 1 if temperature == 0 else args.num_samples  # greedy samples are all the same
        params = SamplingParams(SAMPLE_TOKENS, temperature, top_k=50, seed=0)
        engine = make_engine(loaded.model, loaded.tokenizer, count)
        streams = start_samples(engine, loaded.tokenizer, prompt, params, count, stop=())
        verdicts = []
        for stream in streams:
            text = prompt + "".join(stream)
            verdicts.append(judge_python(text, is_cut=stream.sequence.finish_reason == "length"))
        shares = {verdict: verdicts.count(verdict) / count
                  for verdict in ("compiles", "unfinished", "wrong")}
        results.append(dict(temperature=temperature, samples=count, **shares))
        log(f"  temperature {temperature}: {shares['compiles']:.0%} compile, "
            f"{shares['unfinished']:.0%} are right as far as they go, {shares['wrong']:.0%} wrong")
    return results
