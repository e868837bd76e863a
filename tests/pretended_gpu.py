"""A pretended GPU, where there is none: finds tensors on the wrong device, and waits for the GPU.

Its tensors are the CPU's, in storages with a mark, which views share. Operations raise WrongDevice
where they would fail on a real GPU. Only calls from Python are seen, and only on one thread."""

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")
ATTRIBUTES = {"device": GPU, "is_cuda": True}
# These only ask, read the name of a device, or replace a tensor whole
UNSEEN = {"device", "_parse_to", "_has_compatible_shallow_copy_type", "data"}
# These may have tensors of both devices: then the CPU waits
COPIES = {"to", "cpu", "copy_", "__getitem__", "__setitem__"}
# These need a value, or the size of a result
READS = "item tolist numpy nonzero __bool__ __int__ __float__ __index__ __format__".split()
# What torch.cuda says; the memory is enough for what transformers reserves
ANSWERS = {"is_available": True, "is_bf16_supported": True, "get_device_name": "pretended"}
ANSWERS |= {"current_device": 0, "mem_get_info": (10**10, 10**10)}


class WrongDevice(RuntimeError):
    pass


def on_gpu(tensor):
    return hasattr(tensor.untyped_storage(), "on_gpu")


def find_tensors(x):
    if isinstance(x, torch.Tensor):
        return [] if x.is_meta else [x]  # those on the device meta are nowhere
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [tensor for part in parts for tensor in find_tensors(part)]


def asks_for_gpu(x):
    """None if it is no device."""
    is_device = isinstance(x, str | torch.device) and str(x) in ("cpu", "cuda", "cuda:0")
    return str(x) != "cpu" if is_device else None


def check_index(tensor, index, *value):
    """A tensor on the GPU may have an index on the CPU, but not the other way round. A value goes
    to a slice from any device, but only from its own to what a tensor selects."""
    selecting = [x for x in find_tensors((index,)) if x.dim()]
    bound = [x for x in selecting if on_gpu(x)]
    if selecting:
        bound += [x for x in find_tensors(value) if x.dim()]
    if any(on_gpu(x) != on_gpu(tensor) for x in bound):
        raise WrongDevice("index or value on another device")


class PretendedGPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__"):
            name = getattr(func.__self__, "__name__", "")  # of the attribute
            if name in ATTRIBUTES and on_gpu(args[0]):
                return ATTRIBUTES[name]
        if name in UNSEEN:
            return func(*args, **kwargs)
        inputs = find_tensors((args, kwargs))
        options = [*args, *kwargs.values()]
        asked = {asks_for_gpu(x) for x in options} - {None}
        # A number on the CPU mixes with all
        places = {on_gpu(x) for x in inputs if x.dim() or on_gpu(x) or name in COPIES}
        gpu = True in (asked or places)  # whether the result is on the GPU
        if name in COPIES and inputs and not asked:
            gpu = name != "cpu" and on_gpu(inputs[-1 if name == "to" else 0])

        if name in COPIES:
            waits = len(places | {gpu}) == 2
        elif len(places) == 2:
            raise WrongDevice(f"{name} of tensors on both devices")
        else:
            waits = gpu if name == "tensor" else name in READS and True in places
        if name.endswith("item__"):
            check_index(*args)
        if gpu and any(isinstance(x, torch.Generator) for x in options):
            raise WrongDevice(f"{name} on the GPU, generator on the CPU")
        if gpu and name in ("numpy", "__array__") and not kwargs.get("force"):
            raise WrongDevice(f"{name} of a tensor on the GPU")
        if waits:
            caller = sys._getframe(1)
            self.waits.append(f"{caller.f_code.co_filename}:{caller.f_lineno} {name}")

        kwargs.pop("pin_memory", None)  # which only a real GPU can
        args = ["cpu" if asks_for_gpu(x) else x for x in args]
        kwargs = {key: "cpu" if asks_for_gpu(x) else x for key, x in kwargs.items()}
        result = func(*args, **kwargs)
        if name in ("to", "cpu") and gpu != on_gpu(args[0]):
            result = result.clone()  # else it might be the same tensor
        for x in find_tensors(result) if gpu else ():
            x.untyped_storage().on_gpu = True
        return result


@contextmanager
def pretend():
    group = torch._C._group_tensors_by_device_and_dtype
    autocast = torch.autocast

    def group_on_gpu(lists, *rest):  # it does not ask tensors for their device
        return {(GPU, dtype): tensors for (_, dtype), tensors in group(lists, *rest).items()}

    with pytest.MonkeyPatch.context() as patch, PretendedGPU() as gpu:
        gpu.waits = []  # the line, and the operation, of each time that the CPU waited
        for name, answer in ANSWERS.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group_on_gpu)
        patch.setattr(torch, "autocast", lambda _, *args, **more: autocast("cpu", *args, **more))
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # loads on this thread
        yield gpu
