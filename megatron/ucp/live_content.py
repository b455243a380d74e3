"""The pickle of what a training program saves, without the values of its tensors: they stay where they are.

    content = pickled({"module": model.state_dict(), "iteration": 100})
    content.pickle, content.tensors             # bytes; flat tensors, in the order in which the pickle numbers them

What torch.save does in one go is done in two steps here, so that between them the values can be copied, and written by
another process (save_job.py). Of a tensor its elements are kept, not the storage they are a view of; two names of the
same elements are one tensor.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from megatron.ucp.stored import DTYPES, row_major


@dataclass(frozen=True)
class LiveContent:
    pickle: bytes
    """Of a .pt file, or the whole file where there are values that only torch can write."""
    tensors: tuple[torch.Tensor, ...] = ()
    is_whole_file: bool = False


def pickled(content: Any) -> LiveContent:
    """Raises what pickle raises of values that cannot be pickled."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(content)
    except _OnlyTorchCan:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return LiveContent(buffer.getvalue(), is_whole_file=True)
    return LiveContent(buffer.getvalue(), tuple(pickler.tensors))


class _OnlyTorchCan(Exception):
    """A tensor that is not its elements (sparse, quantized, a subclass), or of a type without a storage class."""


@dataclass(frozen=True, eq=False)
class _Storage:
    identity: tuple[str, Any, str, str, int]


class _Pickler(pickle.Pickler):
    """Protocol 2, as torch.save's."""

    def __init__(self, buffer: io.BytesIO):
        super().__init__(buffer, protocol=2)
        self.tensors: list[torch.Tensor] = []
        self._storages: dict[tuple[Any, ...], _Storage] = {}

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return value.identity
        if isinstance(value, torch.storage.TypedStorage) or torch.is_storage(value):
            raise _OnlyTorchCan
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or type(value) is torch.nn.Parameter:
            return NotImplemented  # of a parameter torch pickles its data
        return (
            torch._utils._rebuild_tensor_v2,
            (self._stored(value), 0, value.shape, row_major(value.shape), value.requires_grad, OrderedDict()),
        )

    def _stored(self, value: torch.Tensor) -> _Storage:
        dtype = DTYPES.get(str(value.dtype).removeprefix("torch."))
        is_plain = type(value) is torch.Tensor and value.layout is torch.strided and value.device.type != "meta"
        if dtype is None or not is_plain or value.is_quantized or value.is_conj() or value.is_neg():
            raise _OnlyTorchCan
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise _OnlyTorchCan  # expanded: fewer places than elements
        flat = value.detach().contiguous().view(-1)
        place = value.device, value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride()
        key = (*place, value.dtype) if value.numel() else (len(self.tensors),)
        if key not in self._storages:
            identity = "storage", getattr(torch, dtype.storage), str(len(self.tensors)), "cpu", value.numel()
            self._storages[key] = _Storage(identity)
            self.tensors.append(flat)
        return self._storages[key]
