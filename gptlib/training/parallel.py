"""What differs between one process, DDP and a sharded model (torch's FSDP2, `fully_shard`).

DDP keeps the whole model on each rank and adds up the gradients. A sharded model is cut along the
first dimension of each parameter: a rank keeps its rows of the weights, of the gradients and of
the optimizer's state, and gathers the weights of a block when that block computes. The training
loop calls the functions below and is the same for all three.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as checkpoint_activations

from gptlib.common import UserError, crc32_of_file
from gptlib.distributed import COLLECTIVE_TIMEOUT, own_rows, require_equal, whole
from gptlib.runtime import compile_model

# MiB of gradients that DDP exchanges at a time. torch.compile cuts the model into graphs at the end
# of each bucket: torch's 25 MiB make 15 of GPT-2's, 100 MiB make 6.
BUCKET_MIB = 100


@dataclass(frozen=True)
class Layout:
    """How a model is laid out over processes and memory.

    shard_ranks: processes that hold one copy between them, 0 for all. reduce_each: add up sharded
    gradients after each micro-batch. recompute_every: of every n-th block the activations are
    computed again in the backward pass, 0 for none.
    """
    shard: bool = False
    shard_ranks: int = 0
    reduce_each: bool = False
    recompute_every: int = 0
    compile: bool = True


# Settings that may differ between hosts: their device, where their files lie, and what rank 0
# alone reads. All others have to be equal.
SETTINGS_OF_A_HOST = {
    "device", "data_root", "log_dir", "hellaswag_data", "init_from", "checkpoint_path", "resume",
    "auto_resume", "log_interval", "wandb", "tensorboard", "keep_checkpoints",
}


def check_same_run(settings, data, world):
    """Raise UserError on every rank if a rank has other settings or other data than rank 0.

    With another --max_steps the ranks would wait for each other; with fewer shards they would
    train on without a word. settings: {name of a flag: value}; data: a Dataset. Collective.
    """
    facts = {f"--{name}": value for name, value in settings.items()
             if name not in SETTINGS_OF_A_HOST}
    facts["the number of training tokens"] = data.train.n_tokens
    facts["the number of validation tokens"] = data.val.n_tokens
    meta = Path(settings["data_root"], "meta.json")
    facts["the CRC-32 of the dataset's meta.json"] = crc32_of_file(meta) if meta.exists() else None
    require_equal(facts, world)


# -----------------------------------------------------------------------------
# the model that trains


def create_on(device, layout, world, create_model, directory=None):
    """The model that create_model() makes, on the device, sharded if the layout says so.

    A sharded model is never whole in memory. It is made on the meta device, which has shapes and
    no numbers. Random weights are drawn one tensor at a time, in the order of an unsharded model,
    and each rank keeps its rows. Weights to start from are mapped, or lie in a checkpoint
    directory, and each rank reads its rows.
    """
    if not layout.shard:
        model = create_model().to(device)
        recompute_blocks(model, layout.recompute_every)
        return model
    # importing these takes seconds, which a run that shards nothing does not spend
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    from gptlib.checkpoints.sharded_tensors import read_tensors
    mesh = shard_mesh(device, world, layout.shard_ranks)
    with torch.device("meta"), KeepOwnRows(mesh) as initial, warnings.catch_warnings():
        # load_state_dict warns that copies to the meta device are lost: KeepOwnRows sees them
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        model = create_model()
    rows = {name: initial.rows.get(p) for name, p in model.named_parameters()}
    recompute_blocks(model, layout.recompute_every)
    if layout.compile:
        compile_blocks(model, device)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    # The embedding and the head are one tensor, which the root shards with all that is outside of
    # the blocks. It has to be wrapped last.
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # evaluation and sampling call it directly
    model.reduce_each = layout.reduce_each
    model.to_empty(device=device)
    if directory:
        read_tensors(directory, {f"model.{name}": p for name, p in model.named_parameters()})
    else:
        fill_parameters(model, rows)
    return model


def shard_mesh(device, world, shard_ranks):
    """The DeviceMesh over which a model is sharded: one row of all ranks or, if fewer hold a copy
    between them, one row for each copy.

    Raises UserError if shard_ranks does not divide the number of ranks, or if torchrun has not
    started this process.
    """
    if not dist.is_initialized():
        raise UserError("--shard needs the processes of torchrun: "
                        "torchrun --standalone --nproc_per_node=8 train_gpt2.py --shard; "
                        "--no-shard trains in this process alone")
    n = shard_ranks or world.size
    if world.size % n:
        raise UserError(f"--shard_ranks is {n}, which does not divide {world.size} processes: "
                        "give the number of GPUs of a host, or 0 to shard over all of them")
    shape, names = (world.size // n, n), ("replicate", "shard")
    if n == world.size:
        shape, names = shape[1:], names[1:]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # groups of ranks have gloo's half hour or NCCL's own time
        set_group_timeout(COLLECTIVE_TIMEOUT, group)
    return mesh


def train_with(raw_model, layout, device, world):
    """The module whose forward pass trains: compiled, and on several processes distributed.

    It shares its weights with raw_model. A sharded model is both at once: its blocks were compiled
    before they were sharded.
    """
    if layout.shard:
        return raw_model
    model = raw_model
    if layout.compile:
        # A short last micro-batch gets a graph of its own (dynamic=False), so that it does not
        # turn every other step into one of dynamic shapes.
        model = compile_model(raw_model, device, dynamic=False)
    if world.size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        # not static_graph: torch 2.13 then fails in the first micro-step that exchanges nothing
        model = DDP(model, device_ids=device_ids, bucket_cap_mb=BUCKET_MIB,
                    gradient_as_bucket_view=True)
    return model


def recompute_blocks(model, every):
    """Let every n-th block keep its input alone, and compute the rest again in the backward pass;
    0: no block.

    Activations then take the memory of one block, for a third more computation
    (arXiv:1604.06174).
    """
    if every:
        for block in model.transformer.h[::every]:
            block.forward = recomputing(block.forward)


def recomputing(forward):
    def forward_and_forget(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint_activations(forward, *args, use_reentrant=False)
    return forward_and_forget


def compile_blocks(model, device):
    """Compile each block's forward pass; FSDP's hooks on the block run outside of that graph."""
    first, *others = model.transformer.h
    forward = first.forward
    first.forward = compile_model(forward, device, dynamic=False)
    if first.forward is forward:  # no compiler works here
        return
    for block in others:
        block.forward = torch.compile(block.forward, dynamic=False)


# -----------------------------------------------------------------------------
# weights of a sharded model


class KeepOwnRows(TorchFunctionMode):
    """A context in which a module made on the meta device gets its initial weights, random or
    loaded, of which this rank keeps its rows.

    Random numbers are those of an unsharded model of the same seed: the functions of torch.nn.init
    run on whole tensors in CPU memory, one after the other, in the same order. The rows of a
    tensor that load_state_dict copies are a view of it: if it is mapped, nothing is read yet.

    rows: {parameter: this rank's rows}
    """

    def __init__(self, mesh):
        super().__init__()
        self.mesh, self.rows = mesh, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.copy_ and args[0].is_meta:
            self.rows[args[0]] = own_rows(args[1], self.mesh)
            return args[0]
        # nn.init.zeros_ and ones_ are seen as the methods of the tensor that they call
        is_init = getattr(function, "__module__", "") == "torch.nn.init"
        if not is_init and function not in (torch.Tensor.zero_, torch.Tensor.fill_):
            return function(*args, **kwargs)
        tensor = kwargs.pop("tensor") if "tensor" in kwargs else args[0]
        if not tensor.is_meta:
            return function(tensor, *args[1:], **kwargs)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        function(whole, *args[1:], **kwargs)
        self.rows[tensor] = own_rows(whole, self.mesh).clone()
        return tensor


@torch.no_grad()
def fill_parameters(model, rows):
    """Copy this rank's rows, {name: tensor}, into the parameters of a sharded model."""
    for name, p in model.named_parameters():
        p.to_local().copy_(rows[name])


# -----------------------------------------------------------------------------
# a step


def set_gradient_sync(model, is_last):
    """Before a forward pass: have the ranks add up their gradients after its backward pass, if it
    is the last micro-batch of a step, or if a sharded model does so after each."""
    if isinstance(model, DDP):
        model.require_backward_grad_sync = is_last
    elif hasattr(model, "set_requires_gradient_sync"):  # fully_shard has given it that method
        model.set_requires_gradient_sync(is_last or model.reduce_each)


def clip_gradients(model, max_norm):
    """Scale the gradients down to max_norm (0: not at all). Returns the norm that they had over the
    whole model, a tensor: on CUDA the host does not wait for it."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return whole(norm)
