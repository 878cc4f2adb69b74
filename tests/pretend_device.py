"""A device that is none: what a GPU would refuse or wait for, seen on a CPU.

Tensors of the pretended device hold their numbers on the CPU and say that they are elsewhere: on `meta`, the one other
device that every build of torch can differentiate on. The mode refuses operations on tensors of both devices, as CUDA
does, and an index from the CPU as well, which CUDA copies in silence and waits. It notes each place where the host
waits for the device: `item`, a copy to the CPU, what has a shape that hangs on numbers, and a copy from the CPU that
is not told to be `non_blocking`, as by `torch.tensor(..., device=...)`, which CUDA ends by waiting for all before it.
"""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
SHAPED_BY_NUMBERS = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.equal.default,
}
# of NCCL
REDUCIBLE = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on `DEVICE`; its numbers are in `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, real):
        self.held = real

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of the pretended device has left its mode")

    def __repr__(self):
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype})"


class _MadeThere(TorchFunctionMode):
    """`torch.tensor` and its like, which would make a tensor of `meta` itself: made here, and moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], PretendedTensor):
            return torch.tensor(args[1], **({"dtype": args[0].dtype} | kwargs)).to(DEVICE)
        if func is torch.Tensor.tolist and isinstance(args[0], PretendedTensor):
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


class PretendDevice(TorchDispatchMode):
    """Tensors are made on `DEVICE`, moved to it, computed with there, and read from there.

    Attributes:
        reads: The operation and the place in our code of each wait of the host.
        collectives: How many operations of several processes there were.
    """

    def __init__(self):
        super().__init__()
        self.reads: list[tuple[str, str]] = []
        self.collectives = 0
        self._made_there = _MadeThere()

    def __enter__(self):
        self._made_there.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._made_there.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [isinstance(one, PretendedTensor) for one in tensors]
        device = kwargs.get("device")
        wanted = None if device is None else torch.device(device)
        to_device = wanted is not None and wanted.type == DEVICE.type
        if to_device:
            kwargs["device"] = "cpu"
        if not any(there) and not to_device:
            return func(*args, **kwargs)
        self._refuse_mixed(func, args, tensors, there)
        self._note_waits(func, args, kwargs, there, None if wanted is None else to_device)
        if func.namespace == "c10d":
            self._check_collective(func, tensors)
        real_args, real_kwargs = tree_map_only(PretendedTensor, lambda one: one.held, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        if func.namespace == "c10d":
            # in place, and the work to wait for
            return (args[0], *result[1:]) if isinstance(result, tuple) else result
        written = [
            args[index] if index < len(args) else kwargs.get(one.name)
            for index, one in enumerate(func._schema.arguments)
            if one.alias_info is not None and one.alias_info.is_write
        ]
        if func._schema.returns and all(
            one.alias_info is not None and one.alias_info.is_write for one in func._schema.returns
        ):
            return written[0] if len(written) == 1 else tuple(written)
        if wanted is not None and not to_device:
            return result
        return tree_map_only(torch.Tensor, PretendedTensor, result)

    def _refuse_mixed(self, func, args, tensors, there):
        if func in (aten.copy_.default, aten._to_copy.default) or not any(there):
            return
        left = [one for one, is_there in zip(tensors, there, strict=True) if not is_there]
        indexing = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        if any(one.ndim > 0 or indexing for one in left):
            shapes = [f"{'device' if one else 'cpu'} {tuple(t.shape)}" for t, one in zip(tensors, there, strict=True)]
            raise MixedDevicesError(f"{func}: expected tensors of one device, got {', '.join(shapes)}.")

    def _note_waits(self, func, args, kwargs, there, to_device):
        reads = func is aten._local_scalar_dense.default or func in SHAPED_BY_NUMBERS
        if func is aten.copy_.default or (func is aten._to_copy.default and to_device is not None):
            target, source = there if func is aten.copy_.default else (to_device, there[0])
            goes_on = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
            reads |= target != source and (source or not goes_on)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            reads |= any(one is not None and one.dtype == torch.bool for one in args[1])
        if reads:
            self.reads.append((str(func), _place()))

    def _check_collective(self, func, tensors):
        """NCCL takes contiguous tensors of its device and of types it knows."""
        self.collectives += 1
        for one in tensors:
            if not isinstance(one, PretendedTensor):
                raise MixedDevicesError(f"{func}: expected tensors of the device, got one of the CPU.")
            if one.dtype not in REDUCIBLE or not one.held.is_contiguous():
                raise MixedDevicesError(f"{func}: NCCL does not take {one.dtype}, {tuple(one.stride())}.")


def _place():
    """Return where our code stands: file, line and function."""
    frames = [one for one in traceback.extract_stack() if "/hf_vicreg/" in one.filename]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno} {frames[-1].name}" if frames else "elsewhere"


__all__ = ["DEVICE", "MixedDevicesError", "PretendDevice", "PretendedTensor"]
