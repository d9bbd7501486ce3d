"""Muon (https://kellerjordan.github.io/posts/muon) over several processes and on GPUs.

Its expensive part, the Newton-Schulz iteration, needs whole matrices. Each matrix has an owner, a
rank that iterates on it and hands the update to the others. With DDP every rank has the whole
gradient already; where the model is sharded, the rows travel to the owner first.
"""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr

from gptlib.distributed import World
from gptlib.runtime import resolve_dtype

# torch 2.13 gave this function another name
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Sharded matrices are updated in parts of about so many elements for each rank: ten bytes an
# element travel or wait. A model that is sharded has no memory for all of them at once.
ELEMENTS_AT_ONCE = 2**25


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose updates equal those of one process, whoever computes them.

    Its state and state dict are those of torch.optim.Muon: a momentum buffer like each parameter.
    As in torch's fused optimizers, a step leaves everything as it is where the tensor `found_inf`
    is not 0; that is decided on the device, and the host does not wait.
    """

    _step_supports_amp_scaling = True
    found_inf = None

    def __init__(self, params, world=World(), **options):
        super().__init__(params, **options)
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters; with several processes, all of them have to call it."""
        assert closure is None, "the gradients have to be there already"
        for group in self.param_groups:
            params, gradients, momenta = [], [], []
            self._init_group(group, params, gradients, momenta)
            assert group["nesterov"], "there is no other kind here"
            for part in parts(params):
                self._update(params[part], gradients[part], momenta[part], group)

    def _update(self, params, gradients, momenta, group):
        """The step of some of a group's parameters."""
        directions = []
        for gradient, momentum in zip(gradients, momenta, strict=True):
            momentum = local(momentum)
            gradient = self._unless_bad(local(gradient), momentum)
            momentum.lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(momentum, group["momentum"])  # Nesterov's
            # half the bytes of float32 to send; most devices iterate in bfloat16 anyway
            directions.append(direction.bfloat16())
        updates = self._orthogonalize(params, directions, group)
        for p, update in zip(params, updates, strict=True):
            lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
            decayed = local(p).mul(1 - group["lr"] * group["weight_decay"])
            local(p).copy_(self._unless_bad(decayed.add_(update, alpha=-lr), local(p)))

    def _unless_bad(self, new, old):
        """new, or old in a step with found_inf."""
        return new if self.found_inf is None else torch.where(self.found_inf > 0, old, new)

    def _orthogonalize(self, params, directions, group):
        """The orthogonal matrix next to each direction; of a sharded one, this rank's rows."""
        if isinstance(params[0], DTensor):
            mesh = params[0].device_mesh
            exchange = RowExchange(params, mesh.get_group(mesh.ndim - 1))
            matrices = orthogonalize(exchange.gather(directions), group)
            return exchange.scatter(matrices, directions)
        if self.world.size == 1:
            return orthogonalize(directions, group)
        owners = assign_owners(params, self.world.size)
        mine = [d for d, owner in zip(directions, owners, strict=True) if owner == self.world.rank]
        return share_matrices(orthogonalize(mine, group), directions, owners, self.world)


def parts(params):
    """Slices of a list of parameters that are updated one after the other: all at once, but of
    sharded ones at most ELEMENTS_AT_ONCE for each rank, or a matrix for each to work on."""
    first, elements = 0, 0
    for i, p in enumerate(params):
        ranks = p.device_mesh.size(-1) if isinstance(p, DTensor) else math.inf
        share = p.numel() / ranks
        if i - first >= ranks and elements + share > ELEMENTS_AT_ONCE:
            yield slice(first, i)
            first, elements = i, 0
        elements += share
    if params:
        yield slice(first, len(params))


def local(tensor):
    """What this rank has of a tensor: its rows of a sharded one, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -----------------------------------------------------------------------------
# Newton-Schulz


def orthogonalize(matrices, group):
    """The result of Newton-Schulz for each bfloat16 matrix, with the constants of the parameter
    group.

    Matrices of one shape go through it in one batch: bit for bit the same, with a tenth of the
    launches on a GPU, and products large enough for all cores of a CPU.
    """
    results = [None] * len(matrices)
    for shape in {matrix.shape for matrix in matrices}:
        places = [i for i, matrix in enumerate(matrices) if matrix.shape == shape]
        stack = newton_schulz(torch.stack([matrices[i] for i in places]), group)
        for i, result in zip(places, stack, strict=True):
            results[i] = result
    return results


def newton_schulz(stack, group):
    """torch.optim.Muon's quintic iteration for a stack (N, rows, columns) of bfloat16 matrices.

    It computes in bfloat16 where the hardware has it, else in float32: a CPU without such
    instructions takes twenty times as long in bfloat16.
    """
    a, b, c = group["ns_coefficients"]
    has_bfloat16 = resolve_dtype("auto", stack.device) == torch.bfloat16
    X = stack if has_bfloat16 else stack.float()
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT
    # the spectral norm has to be at most 1: the Frobenius norm is never smaller
    X = X / torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = X @ X.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, gram, X, beta=a)
    return (X.mT if is_tall else X).to(stack.dtype)


# -----------------------------------------------------------------------------
# owners


def assign_owners(params, n):
    """The owner of each matrix, a rank below n, so that all have about the same work to do.

    The largest matrix goes first, always to the rank with the least so far.
    """
    work = [0] * n
    owners = [None] * len(params)
    for i in sorted(range(len(params)), key=lambda i: -newton_schulz_flops(params[i].shape)):
        owners[i] = work.index(min(work))
        work[owners[i]] += newton_schulz_flops(params[i].shape)
    return owners


def newton_schulz_flops(shape):
    """What one iteration takes, but for a constant: two products of the smaller side's square
    with the longer side, one among squares."""
    short, long = min(shape), max(shape)
    return short * short * (2 * long + short)


def share_matrices(mine, like, owners, world):
    """All matrices, shaped as those of `like`, on every rank: each has computed those it owns."""
    sizes = [0] * world.size
    for matrix, owner in zip(like, owners, strict=True):
        sizes[owner] += matrix.numel()
    largest = max(sizes)  # a rank with less sends padding
    sent = like[0].new_zeros(largest)
    if mine:
        sent[:sizes[world.rank]] = torch.cat([matrix.flatten() for matrix in mine])
    received = sent.new_empty(world.size * largest)
    # as bytes: gloo does not know every dtype
    all_gather(received.view(torch.uint8), sent.view(torch.uint8))

    starts = [rank * largest for rank in range(world.size)]
    matrices = []
    for matrix, owner in zip(like, owners, strict=True):
        start = starts[owner]
        matrices.append(received[start:start + matrix.numel()].view(matrix.shape))
        starts[owner] += matrix.numel()
    return matrices


class RowExchange:
    """Carries the rows of sharded matrices to the owner of each, and the owner's results back."""

    def __init__(self, params, process_group):
        self.group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.shapes = [p.shape for p in params]
        owners = assign_owners(params, self.size)
        # for each rank the numbers of the matrices that it owns
        self.owned = [[i for i, owner in enumerate(owners) if owner == rank]
                      for rank in range(self.size)]

    def rows(self, i, rank):
        """The rows of matrix i that a rank keeps, as a slice: those of torch.chunk."""
        total = self.shapes[i][0]
        per_rank = -(-total // self.size)
        return slice(min(rank * per_rank, total), min((rank + 1) * per_rank, total))

    def shape(self, i, rank):
        """The shape of a rank's rows of matrix i."""
        rows = self.rows(i, rank)
        return rows.stop - rows.start, self.shapes[i][1]

    def gather(self, parts):
        """The whole matrices that this rank owns, from what each rank has of every matrix."""
        mine = self.owned[self.rank]
        sent = [[parts[i] for i in owned] for owned in self.owned]
        shapes = [[self.shape(i, rank) for i in mine] for rank in range(self.size)]
        received = exchange(sent, shapes, self.group, parts[0].device)
        return [torch.cat(pieces) for pieces in zip(*received, strict=True)]

    def scatter(self, matrices, parts):
        """This rank's rows of every matrix, from the whole ones that this rank owns."""
        mine = self.owned[self.rank]
        owned = list(zip(mine, matrices, strict=True))
        sent = [[matrix[self.rows(i, rank)] for i, matrix in owned] for rank in range(self.size)]
        shapes = [[self.shape(i, self.rank) for i in owned] for owned in self.owned]
        received = exchange(sent, shapes, self.group, parts[0].device)
        results = [None] * len(parts)
        for owned, pieces in zip(self.owned, received, strict=True):
            for i, piece in zip(owned, pieces, strict=True):
                results[i] = piece
        return results


def exchange(pieces, shapes, process_group, device):
    """Send pieces[rank], bfloat16 tensors, to each rank; returns what each rank sent, a list of
    tensors of shapes[rank]."""
    empty = torch.empty(0, dtype=torch.bfloat16, device=device)
    sent = torch.cat([empty, *(piece.flatten() for of_rank in pieces for piece in of_rank)])
    sent_sizes = [sum(piece.numel() for piece in of_rank) for of_rank in pieces]
    sizes = [sum(math.prod(shape) for shape in of_rank) for of_rank in shapes]
    received = torch.empty(sum(sizes), dtype=torch.bfloat16, device=device)
    # as bytes: gloo does not know every dtype
    dist.all_to_all_single(
        received.view(torch.uint8), sent.view(torch.uint8),
        output_split_sizes=[2 * size for size in sizes],
        input_split_sizes=[2 * size for size in sent_sizes], group=process_group)

    results = []
    for flat, of_rank in zip(received.split(sizes), shapes, strict=True):
        parts = flat.split([math.prod(shape) for shape in of_rank])
        results.append([part.view(shape) for part, shape in zip(parts, of_rank, strict=True)])
    return results
