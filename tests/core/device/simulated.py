"""A simulated NPU: tensors that say that they are on a device, hold their values on the host, and betray what would make it wait.

Simulated, no more: it computes on the CPU and knows no kernels, no stream and no time. It shows where a training asks the device for an
answer, or for what an NPU cannot do, which an ordinary run on a CPU hides:

    host waits    a value, a shape or a copy comes back from the device, or is sent from memory that is not page-locked (torch_npu
                  synchronises the stream in both cases): counted in `waits`
    refused       float64 and complex tensors on the device; a host tensor amid device ones; what CANN's operators document not to take

Its tensors name their device `meta`, the only one that torch lets a tensor claim without a backend.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from core.device import Accelerator
from tests.core.device import torch_npu

DEVICE = torch.device("meta")
ANSWERS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "equal", "is_nonzero",
    "bincount", "repeat_interleave", "_linalg_check_errors",
}  # fmt: skip
"""Operations whose result, or its size, the host must know before it can go on."""
NOT_TAKEN = {"cumsum": torch.bool}
"""Operand types that an operation's documentation leaves out (aclnnCumsum), of those that our models came near to use."""
NOT_ON_DEVICE = {torch.float64, torch.complex64, torch.complex128}


class DeviceTensor(Tensor):
    """A tensor on the simulated device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        assert held.dtype not in NOT_ON_DEVICE, f"{held.dtype} on an NPU"
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        assert self.shape == value.shape
        self.held = value.held

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch has none of its own for subclasses

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """In another thread, where no `SimulatedDevice` is entered: what that waits for holds up no step."""
        return SimulatedDevice().__torch_dispatch__(function, types, args, kwargs)


class SimulatedDevice(TorchDispatchMode):
    """While it is entered, `DEVICE` exists."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """How often the host waited, by operation and place in our code."""
        self._pinned: set[int] = set()
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
        if name in ("_pin_memory", "is_pinned"):
            return self._pin(args[0]) if name == "_pin_memory" else id(args[0]) in self._pinned
        if name in ("_to_copy", "copy_"):
            moved = self._moved(name, args, kwargs)
            if moved is not None:
                return moved
        if not on_device and kwargs.get("device") != DEVICE:
            return function(*args, **kwargs)
        strangers = [x for x in tensors if not isinstance(x, DeviceTensor) and x.ndim > 0]
        assert not strangers, f"{function} of tensors on the host and on the device: {strangers}"
        assert NOT_TAKEN.get(name) not in {x.dtype for x in on_device}, f"{function} of {NOT_TAKEN[name]} on an NPU"
        if name in ANSWERS or (name.startswith(("index", "_index")) and _has_mask(args)):
            self._wait(name)
        return self._computed(function, args, kwargs, on_device)

    def _computed(self, function: Any, args: Any, kwargs: Any, on_device: list[DeviceTensor]) -> Any:
        if kwargs.get("device") == DEVICE:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        wrapper_of = {id(x.held): x for x in on_device}
        out = function(*tree_map(_held, args), **tree_map(_held, kwargs))

        def wrapped(x: Any) -> Any:
            return (wrapper_of[id(x)] if id(x) in wrapper_of else DeviceTensor(x)) if isinstance(x, Tensor) else x

        return tree_map(wrapped, out)

    def _moved(self, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """Copy between host and device; None where this is neither."""
        if name == "copy_":
            target, source = args[:2]
            to_device, from_device = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
            if to_device == from_device or source.ndim == 0:
                return None
            no_wait = len(args) > 2 and args[2]
        else:
            source, target = args[0], None
            from_device = isinstance(source, DeviceTensor)
            to_device = kwargs.get("device", source.device) == DEVICE
            if to_device == from_device:
                return None
            no_wait = kwargs.get("non_blocking", False)
        if source.numel() > 0 and not (to_device and no_wait and id(source) in self._pinned):
            self._wait("copy to the device" if to_device else "copy from the device")
        if target is not None:
            _held(target).copy_(_held(source))
            return target
        copied = _held(source).to(kwargs.get("dtype") or source.dtype, copy=True)
        return DeviceTensor(copied) if to_device else copied

    def _pin(self, x: Tensor) -> Tensor:
        assert not isinstance(x, DeviceTensor), "only host memory can be page-locked"
        pinned = x.clone()
        self._pinned.add(id(pinned))
        self._kept.append(pinned)  # so that its id is not given to another
        return pinned

    def _wait(self, what: str) -> None:
        ours = [
            frame
            for frame in traceback.extract_stack()
            if "/core/" in frame.filename and "/tests/" not in frame.filename
        ]
        place = f"{ours[-1].name}" if ours else "?"
        self.waits[f"{what} in {place}"] += 1


@contextmanager
def simulated_npu() -> Iterator[tuple[Accelerator, SimulatedDevice]]:
    """The accelerator of `core.device.npu` on a simulated device."""
    with torch_npu.imported({function.__name__: _kernel(function) for function in torch_npu.FUNCTIONS}) as npu:

        class SimulatedNpu(npu.NpuKernels):  # type: ignore[name-defined, misc]
            name, backend, static_shapes, device = "npu", "gloo", True, DEVICE

            def rng_state(self) -> Tensor:
                return torch.get_rng_state()

            def memory_peak_bytes(self) -> int:
                return 0

        with SimulatedDevice() as device:
            yield SimulatedNpu(), device


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a fused kernel of a function of host tensors: on the device it and its gradient are one operation, whatever it does inside."""

    def call(*args: Any, **kwargs: Any) -> Any:
        many: list[Any] = []
        out = _Kernel.apply(function, kwargs, many, *args)
        return (out, *many) if many else out

    return call


class _Kernel(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], kwargs: dict[str, Any], many: list[Any], *args: Any) -> Tensor:
        """`many` gets what the function returns beside its first tensor."""
        leaves = [_held(x) for x in args]
        leaves = [
            x.detach().requires_grad_(needed) if needed else x
            for x, needed in zip(leaves, ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.enable_grad():
            out = function(*leaves, **tree_map(_held, kwargs))
        if isinstance(out, tuple):
            out, *others = out
            many += others
        ctx.leaves, ctx.out = leaves, out
        return DeviceTensor(out.detach())

    @staticmethod
    def backward(ctx: Any, gradient: DeviceTensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        gradients = torch.autograd.grad(ctx.out, [ctx.leaves[i] for i in wanted], gradient.held)
        found = dict(zip(wanted, gradients, strict=True))
        return None, None, None, *(DeviceTensor(found[i]) if i in found else None for i in range(len(ctx.leaves)))


def move(model: nn.Module) -> None:
    """Put a model's parameters on the device."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(DeviceTensor(parameter.detach().clone()))


def speak(group: dist.ProcessGroup) -> None:
    """Let ranks send each other tensors of the device, as those of the host are sent."""
    gloo = group._get_backend(torch.device("cpu"))
    group._register_backend(DEVICE, dist.ProcessGroup.BackendType.GLOO, gloo)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, DeviceTensor) else x


def _has_mask(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_flatten(args[1:2])[0])
