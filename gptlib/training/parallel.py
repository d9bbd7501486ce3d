"""What differs between one process, DDP and a sharded model (torch's FSDP2, `fully_shard`).

DDP keeps the whole model on each rank and adds up the gradients. A sharded model is cut along the
first dimension of each parameter: a rank keeps its rows of the weights, of the gradients and of
the optimizer's state, and gathers the weights of a block when that block computes. The training
loop calls the functions below and is the same for all three.
"""

import ctypes
import math
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as checkpoint_activations

from gptlib.checkpoints.directory import read_tensors
from gptlib.common import UserError
from gptlib.distributed import own_rows, whole
from gptlib.runtime import any_rank, compile_model

# -----------------------------------------------------------------------------
# the model that trains


def create_on(device, cfg, world, create_model, directory=None):
    """The model that create_model() makes, on the device, sharded where cfg asks for it.

    A sharded model is never whole in memory. It is made on the meta device, which has shapes and
    no numbers. Random weights are drawn one tensor at a time, in the order of an unsharded model,
    and each rank keeps its rows; weights to start from are mapped, or lie in a checkpoint
    directory, and each rank reads its rows.
    """
    if not cfg.shard:
        model = create_model().to(device)
        recompute_blocks(model, cfg)
        return model
    return_freed_memory(device)
    mesh = shard_mesh(device, world, cfg.shard_ranks)
    with torch.device("meta"), KeepOwnRows(mesh) as initial, warnings.catch_warnings():
        # load_state_dict warns that copies to the meta device are lost: KeepOwnRows sees them
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        model = create_model()
    rows = {name: initial.rows.get(p) for name, p in model.named_parameters()}
    recompute_blocks(model, cfg)
    compile_blocks(model, cfg, device)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    # The embedding and the head are one tensor, so the root holds both. It comes last: it takes
    # what no block has taken.
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # evaluation and sampling call it directly
    model.to_empty(device=device)
    if directory:
        read_tensors(directory, {f"model.{name}": p for name, p in model.named_parameters()})
    else:
        fill_parameters(model, rows)
    return model


def shard_mesh(device, world, shard_ranks):
    """The DeviceMesh over which a model is sharded: one row of all ranks, or, where fewer hold a
    copy between them, one row for each copy.

    Raises UserError where the number of ranks does not divide by shard_ranks, or where torchrun
    has not started this process.
    """
    if not dist.is_initialized():
        raise UserError("--shard needs the processes of torchrun: "
                        "torchrun --standalone --nproc_per_node=8 train_gpt2.py --shard")
    n = shard_ranks or world.size
    if world.size % n:
        raise UserError(f"--shard_ranks is {n}, which does not divide {world.size} processes: "
                        "give the number of GPUs of a host, or 0 to shard over all of them")
    if n == world.size:
        return init_device_mesh(device.type, (n,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world.size // n, n),
                            mesh_dim_names=("replicate", "shard"))


def return_freed_memory(device):
    """On a CPU have glibc's malloc return large tensors to the system as soon as they are freed:
    the opposite of runtime.keep_freed_memory.

    A sharded model gathers and frees its blocks all the time, in tensors of many sizes. Memory
    that is kept for reuse then has holes that none of them fits into, and a rank's resident set
    grows to twice what its tensors take. Who shards wants the memory, and gives time for it.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 20)


def train_with(raw_model, cfg, device, world):
    """The module whose forward pass trains: compiled, and on several processes distributed.

    It shares its weights with raw_model. A sharded model is both at once: its blocks were compiled
    before they were sharded.
    """
    if cfg.shard:
        return raw_model
    model = raw_model
    if cfg.compile:
        # A short last micro-batch gets a graph of its own (dynamic=False), so that it does not
        # turn every other step into one of dynamic shapes.
        model = compile_model(raw_model, device, dynamic=False, **cfg.tuned.compile_options())
    if world.size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        model = DDP(model, device_ids=device_ids, **cfg.tuned.ddp_options())
    return model


def recompute_blocks(model, cfg):
    """Let every n-th block keep its input alone, and compute the rest again in the backward pass.

    Activations then take the memory of one block, for a third more computation
    (arXiv:1604.06174).
    """
    if not cfg.recompute:
        return
    for block in model.transformer.h[::cfg.recompute_every]:
        block.forward = recomputing(block.forward)


def recomputing(forward):
    def forward_and_forget(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint_activations(forward, *args, use_reentrant=False)
    return forward_and_forget


def compile_blocks(model, cfg, device):
    """Compile each block's forward pass. What shards it runs around that, outside of the graph."""
    if not cfg.compile:
        return
    options = cfg.tuned.compile_options()
    first, *others = model.transformer.h
    forward = first.forward
    first.forward = compile_model(forward, device, dynamic=False, **options)
    if first.forward is forward:  # no compiler works here
        return
    for block in others:
        block.forward = torch.compile(block.forward, dynamic=False, **options)


# -----------------------------------------------------------------------------
# weights of a sharded model


class KeepOwnRows(TorchFunctionMode):
    """A context in which a module made on the meta device gets its initial weights, random or
    loaded, of which this rank keeps its rows.

    Random numbers are those of an unsharded model of the same seed: the functions of torch.nn.init
    run on whole tensors in CPU memory, one after the other, in the same order. The rows of a
    tensor that load_state_dict copies are a view of it: where it is mapped, nothing is read yet.

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


def set_gradient_sync(model, needed):
    """Say before a forward pass whether the ranks add up their gradients after its backward pass.
    """
    if isinstance(model, DDP):
        model.require_backward_grad_sync = needed
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(needed)


def clip_gradients(model, max_norm):
    """Scale the gradients down to max_norm (0: not at all); returns the norm that they had, over
    the whole model, a tensor: on CUDA the host does not wait for it."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return whole(norm)


class Evaluation:
    """A context for forward passes of the uncompiled model under autocast, without gradients.

    Every forward pass of a sharded model gathers its weights from all ranks, so all have to run
    as many. A rank that leaves the context first runs empty ones until the others have left too:
    validation and HellaSwag give the ranks unequal shares, and rank 0 alone draws samples. Of an
    unsharded model this is the autocast alone.
    """

    def __init__(self, model, autocast, world):
        self.model, self.autocast, self.world = model, autocast, world

    def __enter__(self):
        self.autocast.__enter__()
        if isinstance(self.model, FSDPModule):
            self.eager = torch.compiler.set_stance("force_eager")
            self.eager.__enter__()
            self.hidden = self.model.hidden
            self.model.hidden = self.hidden_on_all_ranks

    def hidden_on_all_ranks(self, *args, **kwargs):
        any_rank(True, self.world)  # tells those that have left to take part
        return self.hidden(*args, **kwargs)

    def __exit__(self, *error):
        if isinstance(self.model, FSDPModule):
            self.model.hidden = self.hidden
            if error[0] is None:
                self.follow_the_others()
            self.eager.__exit__(*error)
        self.autocast.__exit__(*error)

    @torch.no_grad()
    def follow_the_others(self):
        idx = torch.zeros(1, 1, dtype=torch.int64, device=self.model.lm_head.weight.device)
        while any_rank(False, self.world):
            self.hidden(idx)
        self.model.reshard()
