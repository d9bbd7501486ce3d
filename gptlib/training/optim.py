"""Skipping an update without making the host wait, and Muon over several processes and on GPUs.

Muon is https://kellerjordan.github.io/posts/muon. Its expensive part, the Newton-Schulz iteration,
needs whole matrices. Each matrix has an owner, the rank that iterates on it and sends the update to
the others. With DDP every rank already has the whole gradient. If the model is sharded, the rows
travel to the owner first.
"""

import math

import torch
import torch.distributed as dist
from torch.optim._muon import _adjust_lr

from gptlib.distributed import World, is_sharded
from gptlib.runtime import resolve_dtype
from gptlib.training.memory import MUON_ELEMENTS_AT_ONCE

# torch 2.13 gave this function another name
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def skip_if_not_finite(optimizer, norm):
    """Make the next optimizer.step() change nothing if the gradient norm, a tensor of one value,
    is not finite: neither weights nor moments.

    Call it just before that step. Fused optimizers and Muon read `found_inf`, as they do after
    torch.amp.GradScaler: the device decides, and the host does not wait for it. For any other
    optimizer the host looks at the norm, and drops the gradients.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~torch.isfinite(norm)).float()
    elif not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)


# -----------------------------------------------------------------------------
# Muon


class Muon(torch.optim.Muon):
    """torch.optim.Muon divided among processes; the updates equal those of one process.

    Its state and state dict are those of torch.optim.Muon: a momentum buffer like each parameter.
    Under DDP a rank keeps up the momenta of its own matrices alone. As in torch's fused optimizers,
    a step changes nothing if the tensor `found_inf` is not 0. The device decides that, and the host
    does not wait.
    """

    _step_supports_amp_scaling = True
    found_inf = None

    def __init__(self, params, world=World(), **options):
        super().__init__(params, **options)
        self.world = world

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters. Collective: every process calls it."""
        assert closure is None, "backward() has to run before step()"
        for group in self.param_groups:
            params, gradients, momenta = [], [], []
            self._init_group(group, params, gradients, momenta)
            assert group["nesterov"], "only Nesterov's momentum is implemented"
            for part in parts(params):
                self._update(params[part], gradients[part], momenta[part], group)

    def state_dict(self):
        """The state of all matrices, on every rank. Collective: every process calls it."""
        for group in self.param_groups:
            params = [p for p in group["params"] if "momentum_buffer" in self.state.get(p, ())]
            for p, owner in zip(params, self._owners(params), strict=True):
                if owner is not None:
                    dist.broadcast(self.state[p]["momentum_buffer"], src=owner)
        return super().state_dict()

    def _owners(self, params):
        """Under DDP the rank that iterates on each matrix; None if all ranks have a part in it."""
        if not params or self.world.size == 1 or is_sharded(params[0]):
            return [None] * len(params)
        return assign_owners(params, self.world.size)

    def _update(self, params, gradients, momenta, group):
        """Update some of the parameters of a group."""
        owners = self._owners(params)
        directions = []
        for gradient, momentum, owner in zip(gradients, momenta, owners, strict=True):
            if owner not in (None, self.world.rank):
                continue
            gradient, momentum = local(gradient), local(momentum)
            if self.found_inf is not None:
                gradient = torch.where(self.found_inf > 0, momentum, gradient)
            momentum.lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(momentum, group["momentum"])  # Nesterov's momentum
            # bfloat16 is half the bytes to send, and most devices iterate in it anyway
            directions.append(direction.bfloat16())
        updates = self._orthogonalize(params, directions, owners, group)
        decay = self._unless_bad(1 - group["lr"] * group["weight_decay"], 1)
        torch._foreach_mul_([local(p) for p in params], decay)
        for p, update in zip(params, updates, strict=True):
            lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
            local(p).add_(update, alpha=-lr)

    def _unless_bad(self, number, otherwise):
        """`number`, or `otherwise` if this step is skipped, which only the device knows."""
        if self.found_inf is None:
            return number
        is_bad = self.found_inf.reshape(()) > 0
        numbers = (torch.full((), n, device=is_bad.device) for n in (otherwise, number))
        return torch.where(is_bad, *numbers)

    def _orthogonalize(self, params, directions, owners, group):
        """The orthogonal matrix nearest to each direction; if sharded, this rank's rows of it.

        They are zeros if the step is skipped. directions: of the matrices that this rank owns or
        has rows of.
        """
        if is_sharded(params[0]):
            mesh = params[0].device_mesh
            exchange = RowExchange(params, mesh.get_group(mesh.ndim - 1))
            matrices = self._solve(exchange.gather(directions), group)
            return exchange.scatter(matrices, directions)
        matrices = self._solve(directions, group)
        if owners[0] is None:
            return matrices
        return share_matrices(matrices, params, owners, self.world)

    def _solve(self, directions, group):
        matrices = orthogonalize(directions, group)
        if self.found_inf is not None and matrices:
            torch._foreach_mul_(matrices, self._unless_bad(1, 0).bfloat16())
        return matrices


def parts(params):
    """Slices of a list of parameters, to be updated one slice after the other.

    Parameters that are not sharded make one slice. Of sharded ones a slice has at most
    MUON_ELEMENTS_AT_ONCE elements a rank, but at least one matrix for each rank to work on.
    """
    first, elements = 0, 0
    for i, p in enumerate(params):
        ranks = p.device_mesh.size(-1) if is_sharded(p) else math.inf
        share = p.numel() / ranks
        if i - first >= ranks and elements + share > MUON_ELEMENTS_AT_ONCE:
            yield slice(first, i)
            first, elements = i, 0
        elements += share
    if params:
        yield slice(first, len(params))


def local(tensor):
    """This rank's part of a tensor: its rows if the tensor is sharded, else all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


# -----------------------------------------------------------------------------
# Newton-Schulz


def orthogonalize(matrices, group):
    """The result of Newton-Schulz for each bfloat16 matrix.

    group: the parameter group, which holds the constants of the iteration. Matrices of one shape
    go through it in one batch. The results are the same bit for bit, with a tenth of the launches
    on a GPU and with products that are large enough for all cores of a CPU.
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

    It computes in bfloat16 if the hardware has instructions for it, else in float32: a CPU
    without them takes twenty times as long in bfloat16.
    """
    a, b, c = group["ns_coefficients"]
    has_bfloat16 = resolve_dtype("auto", stack.device) == torch.bfloat16
    X = stack if has_bfloat16 else stack.float()
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT
    # the spectral norm has to be at most 1, and the Frobenius norm is never smaller
    X = X / torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = X @ X.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, gram, X, beta=a)
    return (X.mT if is_tall else X).to(stack.dtype)


# -----------------------------------------------------------------------------
# owners


def assign_owners(params, n):
    """The owner of each matrix, a rank below n, so that all ranks have about the same work.

    Matrices are assigned from the largest to the smallest, each to the rank with the least work.
    """
    work = [0] * n
    owners = [None] * len(params)
    for i in sorted(range(len(params)), key=lambda i: -newton_schulz_flops(params[i].shape)):
        owners[i] = work.index(min(work))
        work[owners[i]] += newton_schulz_flops(params[i].shape)
    return owners


def newton_schulz_flops(shape):
    """FLOPs of one iteration, up to a constant factor.

    Two products multiply the shorter side's square with the longer side, one multiplies squares.
    """
    short, long = min(shape), max(shape)
    return short * short * (2 * long + short)


def share_matrices(mine, like, owners, world):
    """All matrices on every rank, from those that each rank owns and has computed.

    mine: this rank's bfloat16 matrices; like: a tensor of the shape of each matrix, in the same
    order.
    """
    sizes = [0] * world.size
    for matrix, owner in zip(like, owners, strict=True):
        sizes[owner] += matrix.numel()
    largest = max(sizes)  # a rank with fewer elements sends padding
    sent = torch.zeros(largest, dtype=torch.bfloat16, device=like[0].device)
    if mine:
        sent[:sizes[world.rank]] = torch.cat([matrix.flatten() for matrix in mine])
    received = sent.new_empty(world.size * largest)
    # sent as bytes, since gloo does not know every dtype
    all_gather(received.view(torch.uint8), sent.view(torch.uint8))

    starts = [rank * largest for rank in range(world.size)]
    matrices = []
    for matrix, owner in zip(like, owners, strict=True):
        start = starts[owner]
        matrices.append(received[start:start + matrix.numel()].view(matrix.shape))
        starts[owner] += matrix.numel()
    return matrices


class RowExchange:
    """Sends the rows of sharded matrices to their owners, and the owners' results back."""

    def __init__(self, params, process_group):
        self.group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.shapes = [p.shape for p in params]
        owners = assign_owners(params, self.size)
        # for each rank, the indices of the matrices that it owns
        self.owned = [[i for i, owner in enumerate(owners) if owner == rank]
                      for rank in range(self.size)]

    def rows(self, i, rank):
        """The slice of matrix i's rows that a rank keeps, the same as torch.chunk's."""
        total = self.shapes[i][0]
        per_rank = -(-total // self.size)
        return slice(min(rank * per_rank, total), min((rank + 1) * per_rank, total))

    def shape(self, i, rank):
        """The shape of what a rank keeps of matrix i."""
        rows = self.rows(i, rank)
        return rows.stop - rows.start, self.shapes[i][1]

    def gather(self, parts):
        """The whole matrices that this rank owns, assembled from the rows of all ranks."""
        mine = self.owned[self.rank]
        sent = [[parts[i] for i in owned] for owned in self.owned]
        shapes = [[self.shape(i, rank) for i in mine] for rank in range(self.size)]
        received = exchange(sent, shapes, self.group, parts[0].device)
        return [torch.cat(pieces) for pieces in zip(*received, strict=True)]

    def scatter(self, matrices, parts):
        """Send the owned, whole matrices out by rows; returns this rank's rows of every matrix."""
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
    """Send the list pieces[rank] of bfloat16 tensors to each rank.

    Returns for each rank the list of tensors that it sent, of the shapes in shapes[rank].
    """
    empty = torch.empty(0, dtype=torch.bfloat16, device=device)
    sent = torch.cat([empty, *(piece.flatten() for of_rank in pieces for piece in of_rank)])
    sent_sizes = [sum(piece.numel() for piece in of_rank) for of_rank in pieces]
    sizes = [sum(math.prod(shape) for shape in of_rank) for of_rank in shapes]
    received = torch.empty(sum(sizes), dtype=torch.bfloat16, device=device)
    # sent as bytes, since gloo does not know every dtype
    dist.all_to_all_single(
        received.view(torch.uint8), sent.view(torch.uint8),
        output_split_sizes=[2 * size for size in sizes],
        input_split_sizes=[2 * size for size in sent_sizes], group=process_group)

    results = []
    for flat, of_rank in zip(received.split(sizes), shapes, strict=True):
        parts = flat.split([math.prod(shape) for shape in of_rank])
        results.append([part.view(shape) for part, shape in zip(parts, of_rank, strict=True)])
    return results
