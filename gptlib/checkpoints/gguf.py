"""GPT-2 as a GGUF file, which llama.cpp, Ollama and LM Studio run.

A GGUF file has two parts: a header of metadata (hyperparameters, the tokenizer, name, shape and
type of each tensor), then the tensors. llama.cpp's own converter for GPT-2 is
`conversion/gpt2.py` in its repository.
"""

import os
import re
from pathlib import Path

import numpy as np

from gptlib.checkpoints.huggingface import to_transformers
from gptlib.common import UserError, atomic_write, import_optional
from gptlib.data.tokenizer import BYTE_OF, EOT, GPT2_SPLIT, check_vocabulary

DTYPES = ("f16", "bf16", "q8_0")
LAYER_NORM_EPSILON = 1e-5  # of torch.nn.LayerNorm, and of GPT-2
LAYERS_OF_A_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def dtype_from_name(path):
    """The dtype that a file's name ends in: q8_0 for model-q8_0.gguf, f16 if the name has none.

    Raises UserError for a type of llama.cpp's that is not written here, such as q4_k_m.
    """
    match = re.search(r"[._-](b?f\d+|i?q\d\w*)$", Path(path).stem.lower())
    dtype = match[1] if match else "f16"
    check_dtype(dtype)
    return dtype


def check_dtype(dtype):
    if dtype not in DTYPES:
        expected = ", ".join(DTYPES)
        raise UserError(f"cannot write GGUF in {dtype}, expected {expected}: export one of these, "
                        "and let llama.cpp's llama-quantize make other types of it")


def export_gguf(model, tokenizer, path, dtype="f16"):
    """Write the model and its tokenizer as one GGUF file, whole or not at all.

    tokenizer: the model's tiktoken.Encoding; dtype: the type of the matrices, f16, bf16 or q8_0 (8
    bits, and a scale for every 32 weights). Biases, layer norms and positions stay in float32. Rows
    of the embedding past the tokenizer's ids are cut. The file's folder is made. Raises UserError
    if llama.cpp would compute something else than this model or split text into other tokens, or
    if the file can't be written.
    """
    check_dtype(dtype)
    check_model(model.config, tokenizer)
    merges = derive_merges(tokenizer._mergeable_ranks)
    gguf = import_optional("gguf")
    to_transformers(model, tokenizer.n_vocab)  # raises UserError for a model that is not GPT-2
    config, state = model.config, model.state_dict()
    tensors = list_tensors(config, state, tokenizer.n_vocab, dtype)

    writer = gguf.GGUFWriter(None, "gpt2")
    add_hyperparameters(writer, config, tokenizer.n_vocab, Path(path).stem, dtype)
    add_tokenizer(writer, tokenizer, merges)
    for name, weight, qtype in tensors:
        shape = tuple(weight.shape)
        n_bytes = np.prod(gguf.quants.quant_shape_to_byte_shape(shape, qtype))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(n_bytes), qtype)

    def write(f):
        try:
            writer.write_header_to_file(Path(f.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        # Not GGUFWriter.write_tensor_data: its ndarray.tofile can miss that the disk is full.
        # One tensor is converted at a time, so the export of a large model needs little memory.
        f.seek(0, os.SEEK_END)
        for name, weight, qtype in tensors:
            writer.write_padding(f, f.tell())
            f.write(quantize(name, weight, qtype).data)
        writer.write_padding(f, f.tell())

    make_folder_of(path)
    atomic_write(path, write)


def make_folder_of(path):
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def check_model(config, tokenizer):
    """Raise UserError if llama.cpp cannot run this model, or split text as its tokenizer does."""
    if config.gelu != "tanh":
        raise UserError("cannot export a model with the exact GELU (nanoGPT's): llama.cpp computes "
                        "GPT-2 with the tanh approximation, so its results would differ; export a "
                        "Hugging Face directory instead")
    check_vocabulary("the model", config.vocab_size, tokenizer)
    if tokenizer.name not in ("gpt2", "bpe-gpt2") or tokenizer._pat_str != GPT2_SPLIT:
        raise UserError(f"cannot export the tokenizer {tokenizer.name!r}: a GGUF file can't "
                        "express how it splits text into words, so llama.cpp would make other "
                        "tokens. One that exports is trained by "
                        "python fineweb.py --tokenizer bpe --pattern gpt2")
    if tokenizer._special_tokens.keys() != {EOT} or EOT.encode() in tokenizer._mergeable_ranks:
        raise UserError(f"cannot export the tokenizer: expected {EOT} as its only special token")


def derive_merges(ranks):
    """The pairs of tokens that byte-pair encoding merges, as [(left, right)] of bytes, by rank.

    ranks: {token bytes: rank}. tiktoken merges any two tokens that make a third; llama.cpp merges
    only the pairs that the file lists. Yet just one pair per token can ever come up: the two
    parts that remain of the token's bytes when all merges of lower rank are done. If more than
    two parts remain, merges never make the token (tiktoken still finds it if it is a whole word),
    and neither would llama.cpp: UserError.
    """
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError("cannot export the tokenizer: not all of the 256 bytes are tokens")
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = apply_merges(token, ranks, rank)
        if len(parts) != 2:
            raise UserError(f"cannot export the tokenizer: its token {rank} ({token!r}) is no "
                            "merge of two tokens of "
                            "lower rank, so llama.cpp would never make it")
        merges.append(tuple(parts))
    if not merges:
        raise UserError("cannot export the tokenizer: its tokens are single bytes, and llama.cpp "
                        "needs merges")
    return merges


def apply_merges(text, ranks, limit):
    """The tokens that byte-pair encoding makes of some bytes, with the merges below a rank."""
    parts = [text[i:i + 1] for i in range(len(text))]
    while len(parts) > 1:
        pairs = zip(parts, parts[1:], strict=False)
        pair_ranks = [ranks.get(left + right, limit) for left, right in pairs]
        best = min(pair_ranks)
        if best >= limit:
            break
        i = pair_ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def add_hyperparameters(writer, config, n_vocab, name, dtype):
    import gguf
    writer.add_name(name)
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer, tokenizer, merges):
    """Add the tokens by id and the merges, both spelled in GPT-2's byte alphabet."""
    import gguf
    char_of = {byte: char for char, byte in BYTE_OF.items()}

    def spell(token):
        return "".join(char_of[byte] for byte in token)

    eot = tokenizer.eot_token
    tokens, types = [EOT] * tokenizer.n_vocab, [gguf.TokenType.NORMAL] * tokenizer.n_vocab
    for token, rank in tokenizer._mergeable_ranks.items():
        tokens[rank] = spell(token)
    types[eot] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the name by which llama.cpp knows GPT-2's pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{spell(left)} {spell(right)}" for left, right in merges])
    writer.add_bos_token_id(eot)
    writer.add_eos_token_id(eot)
    writer.add_add_bos_token(False)


def list_tensors(config, state, n_vocab, dtype):
    """The tensors of the file as [(GGUF's name, weight, type)].

    The head is not among them: it is the embedding, which llama.cpp uses for both if the file has
    no output.weight.
    """
    import gguf
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    matrix, float32 = gguf.GGMLQuantizationType[dtype.upper()], gguf.GGMLQuantizationType.F32
    wte = state["lm_head.weight"][:n_vocab]
    tensors = [("transformer.wte.weight", wte, matrix),
               ("transformer.wpe.weight", state["transformer.wpe.weight"], float32)]
    blocks = [f"transformer.h.{i}.{layer}"
              for i in range(config.n_layer) for layer in LAYERS_OF_A_BLOCK]
    for layer in (*blocks, "transformer.ln_f"):
        weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
        if bias is None:  # llama.cpp has no GPT-2 without biases: zeros are the same function
            bias = weight.new_zeros(weight.shape[0])
        tensors.append((f"{layer}.weight", weight, matrix if weight.dim() == 2 else float32))
        tensors.append((f"{layer}.bias", bias, float32))

    def type_of(weight, qtype):
        block_size, _ = gguf.GGML_QUANT_SIZES[qtype]
        # rows that don't divide into blocks stay in f16, as in llama.cpp's converter
        return qtype if weight.shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.F16

    suffixes = (".weight", ".bias")
    return [(names.get_name(name, try_suffixes=suffixes), weight, type_of(weight, qtype))
            for name, weight, qtype in tensors]


def quantize(name, weight, qtype):
    """The weight as the contiguous numpy array that the file holds. Raises UserError if f16 can't
    hold it.
    """
    import gguf
    values = weight.detach().float().cpu().contiguous().numpy()
    if not np.isfinite(values).all():
        raise UserError(f"cannot export the model: its {name} is not finite")
    if qtype == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise UserError(f"cannot export the model in f16: its {name} has values that are too "
                        "large; use bf16")
    return np.ascontiguousarray(gguf.quants.quantize(values, qtype))
