"""A GPU that is not there. Its tensors have shapes, dtypes and devices but no values (torch's FakeTensor).

    with FakeGPU((9, 0)) as gpu:            # a compute capability
        learner.fit(2)
    gpu.waits                               # Counter of (what, "file.py:line")

Tensors on the CPU stay real. A mix of devices or dtypes raises an error, as on a GPU. Where Python would wait for the
GPU (item, nonzero, a copy that blocks), the fake notes the place and answers with a guess; reading by a mask raises,
since the shape would be a guess too. torch.compile, cuDNN's LSTM and Triton's kernels are replaced by functions that
only look at the tensors they get.
"""
import contextlib
import ctypes
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nbutils import kernel, qrnn

# A module, the function that loads its Triton kernels, and what this returns, given a stand-in for one kernel.
KERNELS = [(kernel, "_load", lambda launcher: (launcher, False)),
           (qrnn, "_load_kernels", lambda launcher: (launcher, launcher))]
ANSWERS = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
           "_exchange_device": 0, "_maybe_exchange_device": 0, "manual_seed_all": None, "max_memory_allocated": 0,
           "reset_peak_memory_stats": None, "is_current_stream_capturing": False}
ONE_DTYPE = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}    # FakeTensor takes any
REAL_LSTM, REAL_GENERATOR = torch.lstm, torch.Generator


def on_gpu(t):
    return isinstance(t, FakeTensor) and t.fake_device.type == "cuda"


class FakeGPU(TorchDispatchMode):
    def __init__(self, capability):
        super().__init__()
        self.capability, self.waits, self.launches = capability, Counter(), Counter()
        self.fakes, self.patches = FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack()

    def wait(self, what):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        self.waits[what, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        goes_to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not goes_to_gpu and not any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None                              # the CPU's; nobody sees what it draws
        if name in ("_to_copy", "copy_"):
            self.copy(name, args, kwargs, goes_to_gpu)
        if name in ONE_DTYPE and len({t.dtype for t in tree_leaves(args) if on_gpu(t)}) > 1:
            raise RuntimeError(f"{name}: the operands differ in dtype")
        if name == "index_put_" and any(t.dtype == torch.bool for t in tree_leaves(args[1])):
            self.wait("index by a mask")
        with self.fakes:
            if name in ("_local_scalar_dense", "equal"):            # item() and if
                return self.guess(args[0], name)
            if name == "nonzero":
                self.wait(name)
                return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
            if name == "repeat_interleave" and kwargs.get("output_size") is None:
                self.wait(name)
                return args[0].new_empty(len(args[0]))
            out = func(*args, **kwargs)
        if name == "any":
            out.guess = False
        return out

    def guess(self, t, name):
        if on_gpu(t):
            self.wait("item" if name == "_local_scalar_dense" else name)
        if name == "equal" or t.dtype == torch.bool:
            return getattr(t, "guess", True)
        return 0.0 if t.is_floating_point() else 1

    def tolist(self, t):
        value = self.guess(t, "tolist")
        for n in reversed(t.shape):
            value = [value] * n
        return value

    def copy(self, name, args, kwargs, to_gpu):
        source, queued = args[0], kwargs.get("non_blocking")
        if name == "copy_":
            source, to_gpu, queued = args[1], on_gpu(args[0]), args[2:] == (True,)
        elif kwargs.get("device") is None:
            to_gpu = on_gpu(source)
        if on_gpu(source) and not to_gpu:
            self.wait("copy to the host")
        if to_gpu and not on_gpu(source) and not (queued and getattr(source, "page_locked", False)):
            self.wait("copy to the GPU")

    def lstm(self, x, hx, weights, *options):
        """One layer's shapes, from operations that are as strict about devices and dtypes as cuDNN."""
        if not on_gpu(x):
            return REAL_LSTM(x, hx, weights, *options)
        gates = F.linear(x, weights[0], weights[2]) + F.linear(hx[0], weights[1], weights[3])
        out = torch.lerp(*gates.split(hx[1].shape[2], 2)[:2], hx[1])
        return out, out[-1:], out[-1:]

    def launcher(self, name):
        def launch(*args, **options):
            if not all(map(on_gpu, (t for t in args if isinstance(t, torch.Tensor)))):
                raise ValueError(f"{name}: a kernel is given a tensor that is not on the GPU")
            self.launches[name] += 1
        return mock.MagicMock(**{"__getitem__.return_value": launch})      # kernel[grid](...)

    def __enter__(self):
        forget_contexts()
        torch._C._ensureCUDADeviceGuardSet()
        patches = [(torch.cuda, name, lambda *args, _value=value, **kwargs: _value) for name, value in ANSWERS.items()]
        patches += [
            (torch.cuda, "get_device_capability", lambda *args: self.capability),
            (torch.cuda, "is_bf16_supported", lambda *args: self.capability >= (8, 0)),
            (torch.cuda, "synchronize", lambda *args: self.wait("synchronize")),
            (torch, "Generator", lambda device="cpu": REAL_GENERATOR("cpu")),
            (torch, "compile", lambda model=None, **options: model),
            (torch, "lstm", self.lstm),
            (torch.nn.Module, "_apply", move),
            (torch.Tensor, "pin_memory", page_locked),
            (FakeTensor, "tolist", lambda t: self.tolist(t)),
            (FakeTensor, "data_ptr", lambda t: t.untyped_storage()._cdata + t.storage_offset() * t.element_size()),
            (FakeTensorMode, "avoid_device_init", property(lambda mode: True)),
            (fake_tensor, "init_gpu_context", lambda *args: None)]
        for module, name, loaded in KERNELS:
            patches.append((module, name, lambda *args, _loaded=loaded(self.launcher(module.__name__)): _loaded))
        for owner, name, value in patches:
            self.patches.enter_context(mock.patch.object(owner, name, value, create=True))
        self.patches.enter_context(torch.autograd.set_multithreading_enabled(False))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()


def page_locked(t):
    t = t.clone()
    t.page_locked = True
    return t


@torch.no_grad()
def move(module, function, recurse=True):
    """module.to(...), where a real parameter becomes a fake one and stays the object that an optimizer may hold."""
    for child in module.children():
        move(child, function)
    for p in (p for p in module._parameters.values() if p is not None):
        new = function(p)
        if isinstance(new, FakeTensor) and not isinstance(p, FakeTensor):
            new = torch.nn.Parameter(new, p.requires_grad)
            p.__class__, p.__dict__ = new.__class__, new.__dict__
            torch._C._swap_tensor_impl(p, new)
        else:
            p.data = new
    module._buffers.update({name: function(b) for name, b in module._buffers.items() if b is not None})
    return module


def forget_contexts():
    """Let autograd believe that no GPU has a context yet; asking needs a driver.

    Its engine asks the fifth virtual function of torch's CUDAHooks, hasPrimaryContext. A C++ object begins with the
    address of a table of such functions, so we give this object a copy in which the fifth says no.
    """
    if not forget_contexts.kept:
        library, word = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")), ctypes.sizeof(ctypes.c_void_p)
        library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
        hooks = ctypes.cast(library._ZN2at6detail12getCUDAHooksEv(), ctypes.POINTER(ctypes.c_void_p))
        before = 2                                                  # words of type information in front of the table
        table = (ctypes.c_void_p * 96).from_buffer_copy(ctypes.string_at(hooks[0] - before * word, 96 * word))
        no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, index: False)
        table[before + 4] = ctypes.cast(no, ctypes.c_void_p).value
        hooks[0] = ctypes.addressof(table) + before * word
        forget_contexts.kept = table, no                            # needed as long as the process lives


forget_contexts.kept = None
