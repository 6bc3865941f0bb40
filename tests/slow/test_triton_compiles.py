"""Every Triton kernel compiles for the GPUs that we name, down to the machine's code, and no GPU is needed for it."""
import re
import subprocess
from pathlib import Path

import pytest
import torch

from nbutils import awd_lstm, engines, kernel, qrnn
from nbutils.amsgrad import Adam, AdamW
from nbutils.momentum import SGD

triton = pytest.importorskip("triton", reason="Triton is not installed on this system")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {75: "T4", 80: "A100", 90: "H200"}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
RULES = {"sgd": (SGD, {}), "momentum": (SGD, {"momentum": 0.9, "l2": 0.1}), "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
         "adam": (Adam, {"l2": 0.1}), "adamw": (AdamW, {"weight_decay": 0.1}),
         "adamw-amsgrad": (AdamW, {"weight_decay": 0.1, "amsgrad": True})}


def optimizer_kernel(rule, dtype, align=16):
    make, hypers = RULES[rule]
    opt = make([torch.nn.Parameter(torch.zeros(3, dtype=dtype))], lr=0.1, **hypers)
    active, names = engines._plan(opt, opt.param_groups[0])
    program, numbers = engines._probe(active, names, 3)
    columns = tuple((name, dtype) for name in ("p", "g", *(f"s_{name}" for name in names)))
    function, in_double = kernel._load(program, columns, align, len(numbers))
    given = {"numbers": "*fp64"} if in_double else {f"n{i}": "fp32" for i in range(len(numbers))}
    return function, {"addresses": "*i64", "owner": "*i32", "first": "*i64", "length": "*i64", "tensors": "i32", **given}, {"WIDTH": 1024}


def qrnn_kernel(which, gated, dtype):
    gate, memory = (f"*{TYPES[t]}" for t in (dtype, torch.promote_types(dtype, torch.float32)))
    names = {"forward": "z f o START c h LAST", "backward": "z f o START c g G_LAST to_z to_f to_o TO_START"}[which].split()
    signature = {name.lower(): memory if name.isupper() else gate for name in names} | {"steps": "i32", "columns": "i32"}
    return qrnn._load_kernels()[which == "backward"], signature, {"GATED": gated, "WIDTH": qrnn._WIDTH}


def loss_kernel(which, dtype):
    names = {"forward": "LOGITS TARGETS losses tops logs", "backward": "LOGITS TARGETS tops logs g TO_LOGITS"}[which].split()
    kinds = {"TARGETS": "*i64"} | {name: f"*{TYPES[dtype]}" for name in ("LOGITS", "TO_LOGITS")}
    signature = {name.lower(): kinds.get(name, "*fp32") for name in names} | {"columns": "i32", "stride": "i32"}
    return awd_lstm._load_kernels()[which == "backward"], signature, {"WIDTH": awd_lstm._WIDTH}, {"num_warps": awd_lstm._WARPS}


# name: what gives the function, the types of its arguments, its constants, and options of the launch
KERNELS = {f"{rule}-{TYPES[dtype]}": (optimizer_kernel, rule, dtype)
           for rule in RULES for dtype in (torch.float32, torch.bfloat16, torch.float64)}
KERNELS["adamw-fp32-unaligned"] = (optimizer_kernel, "adamw", torch.float32, 4)
KERNELS |= {f"qrnn-{which}-{'gated' if gated else 'plain'}-{TYPES[dtype]}": (qrnn_kernel, which, gated, dtype)
            for which in ("forward", "backward") for gated in (True, False) for dtype in TYPES}
KERNELS |= {f"loss-{which}-{TYPES[dtype]}": (loss_kernel, which, dtype) for which in ("forward", "backward") for dtype in TYPES}


@pytest.fixture(autouse=True)
def compile_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")         # Triton 3.9 warns where it is not set
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def compiled(function, signature, constants, capability, **options):
    """Compile as a launch does whose addresses can be divided by 16."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options or None).asm


def bytes_on_stack(asm, tmp_path):
    """Bytes of a thread that lie in (slow) local memory: arrays, and registers that were spilled."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(asm["cubin"])
    text = subprocess.run([DUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.search(r"STACK:(\d+).* LOCAL:(\d+)", text).groups()))


@pytest.mark.parametrize("capability", TARGETS, ids=TARGETS.get)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, capability, tmp_path):
    make, *arguments = KERNELS[name]
    function, signature, constants, *options = make(*arguments)
    asm = compiled(function, signature, constants, capability, **dict(*options))
    assert re.search(rf"^\.target sm_{capability}", asm["ptx"], re.M)
    assert f".entry {function.__name__}(" in asm["ptx"]
    assert bytes_on_stack(asm, tmp_path) == 0


def test_the_widest_loads_need_aligned_addresses():
    """What the second kernel is for: 16 bytes at a time, or 4."""
    for align, wide in ((16, True), (4, False)):
        asm = compiled(*optimizer_kernel("adamw", torch.float32, align), 90)
        assert ("ld.global.v4.b32" in asm["ptx"]) is wide


def test_a_spill_would_be_seen(tmp_path):
    asm = compiled(*optimizer_kernel("adamw-amsgrad", torch.float64), 80, maxnreg=24)
    assert bytes_on_stack(asm, tmp_path) > 0
