"""Nests of tensors that several processes share: sent from rank 0, or sharded between the ranks.

A nest is what a checkpoint is: dicts, lists and tuples, with tensors and plain values as leaves.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

# -----------------------------------------------------------------------------
# nests


def map_leaves(nest, function):
    """The same nest of dicts, lists and tuples, every leaf replaced by function(leaf)."""
    return map_named(nest, lambda leaf, name: function(leaf))


def map_named(nest, function, name=""):
    """The same nest, every leaf replaced by function(leaf, name).

    A leaf's name is made of the keys that lead to it, such as "model.lm_head.weight".
    """
    if isinstance(nest, dict):
        return {key: map_named(value, function, f"{name}{key}.") for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        items = [map_named(value, function, f"{name}{i}.") for i, value in enumerate(nest)]
        return type(nest)(items)
    return function(nest, name[:-1])


# -----------------------------------------------------------------------------
# from rank 0 to the others, one tensor at a time: pickling the whole nest, as
# broadcast_object_list does, would hold three to four copies of it in memory


@dataclass(frozen=True)
class TensorPlace:
    """Stands for a tensor of a nest whose tensors are sent separately."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


def split_tensors(nest):
    """(skeleton, tensors): the nest with a TensorPlace for each tensor, and the list of tensors.

    A tensor that stands in several places is listed once.
    """
    tensors, places = [], {}

    def replace_tensor(leaf):
        if not torch.is_tensor(leaf):
            return leaf
        key = leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype
        if leaf.numel() == 0 or key not in places:
            places[key] = TensorPlace(len(tensors), leaf.shape, leaf.dtype)
            tensors.append(leaf.detach())
        return places[key]

    return map_leaves(nest, replace_tensor), tensors


def broadcast_nest(nest, rank, keep_own=False):
    """Rank 0's nest, on every process. Its tensors must lie in CPU memory.

    Collective: every process calls it. A process with keep_own takes part, because a broadcast
    needs all of them, and returns the nest that it passed in.
    """
    skeleton, tensors = split_tensors(nest) if rank == 0 else (None, [])
    places = [TensorPlace(i, tensor.shape, tensor.dtype) for i, tensor in enumerate(tensors)]
    message = [(skeleton, places)]
    dist.broadcast_object_list(message, src=0)
    skeleton, places = message[0]

    received = []
    for place in places:
        if rank == 0:
            tensor = tensors[place.index].contiguous()
        else:
            tensor = torch.empty(place.shape, dtype=place.dtype)
        if tensor.numel() > 0:
            # as bytes: the same for every dtype, including those that gloo does not know
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        received.append(None if keep_own else tensor)
    if rank == 0 or keep_own:
        return nest

    def fill_place(leaf):
        return received[leaf.index] if isinstance(leaf, TensorPlace) else leaf

    return map_leaves(skeleton, fill_place)


# -----------------------------------------------------------------------------
# sharded tensors


def whole(tensor):
    """The whole of a tensor that may be sharded. Collective if it is: every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor, mesh):
    """The rows of a whole tensor that this rank keeps: torch.chunk along the first dimension."""
    chunks = tensor.chunk(mesh.size(-1))
    rank = mesh.get_local_rank(mesh.ndim - 1)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def shard_like(tensor, parameter):
    """This rank's part of a whole tensor, laid out as the parameter is: a DTensor like it.

    The tensor itself is returned if the parameter is not sharded or has another shape (a step
    count has). Nothing is copied from an empty tensor on the meta device.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    part = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    if not tensor.is_meta:
        part.to_local().copy_(own_rows(tensor, parameter.device_mesh))
    return part
