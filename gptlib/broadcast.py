"""Sends a nest of dicts, lists and tensors from rank 0 to other processes, one tensor at a time.

Pickling the whole nest instead, as broadcast_object_list does, holds three to four copies of it in
memory.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor belongs in a nest whose tensors are sent separately."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


def map_leaves(nest, function):
    """The same nest of dicts, lists and tuples, every leaf replaced by function(leaf)."""
    return map_named(nest, lambda leaf, name: function(leaf))


def map_named(nest, function, name=""):
    """The same, with function(leaf, name): the keys that lead to a leaf, "model.lm_head.weight".
    """
    if isinstance(nest, dict):
        return {key: map_named(value, function, f"{name}{key}.") for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        items = [map_named(value, function, f"{name}{i}.") for i, value in enumerate(nest)]
        return type(nest)(items)
    return function(nest, name[:-1])


def split_tensors(nest):
    """(skeleton, tensors): the nest with a TensorPlace for each tensor, and the tensors, shared
    ones only once."""
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
    """Rank 0's nest, on every process: called by all of them. Tensors have to lie in CPU memory.

    A process with keep_own takes part, because a broadcast needs all, and returns the nest it came
    with.
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
