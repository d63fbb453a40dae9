"""Compiles every Triton kernel ahead of time and prints one JSON line per kernel, variant and target.

A script of its own process (tests/test_triton_compile.py starts it): a process that interprets kernels cannot compile
them. Needs no GPU: triton brings its assemblers. `python tests/triton_aot.py sm_90 gfx942` names the targets.

The variants are what a launch would specialise on: every optional argument present and absent, and sizes of 1, which
Triton turns into constants. Pointers are taken as aligned to 16 bytes; vocabulary sizes and strides as multiples of
16 in the variants called full, as anything in those called bare. All of them for sm_90, the full ones elsewhere.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from scope_fast.kernels import linear_logprob, linear_scope_loss, scope_loss, softmax, step_pool, weight_bucket
from scope_fast.kernels.rows import Streams, _reduce_table_kernel
from scope_fast.ops.options import RowOptions

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FULL = Streams("*u8", *["*fp32"] * 5)
BARE = Streams("*u8", "*fp32", None, None, None, None)
OPTIONS = RowOptions(*["fp32"] * len(RowOptions._fields))
F32 = "*fp32"
# logits, dlogits, whether there is a gradient: bfloat16 inputs with either kind of logits, float32 inputs, no gradient
HEADS = (("*fp32", "*bf16", True), ("*bf16", "*bf16", True), ("*fp32", "*fp32", True), ("*fp32", "*bf16", False))
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def vocabulary(name: str, *arguments: str) -> dict:
    """Sizes and strides: multiples of 16 in the full variants, as in nearly every model; of the row kernels the strides
    alone, which logit_buffer makes so, whatever the vocabulary."""
    aligned = dict.fromkeys(arguments or ("size", "stride", "dstride"), "i32:16" if name == "full" else "i32")
    return aligned | ({"size": "i32"} if "stride" in aligned else {})


def variants():
    """(kernel, variant, arguments by name, launch options); an int stands for a constexpr, None for an absent one."""
    for name, streams, o in (("full", FULL, OPTIONS), ("bare", BARE, OPTIONS)):
        entropy = F32 if name == "full" else None
        yield scope_loss._scope_loss_kernel, name, {
            "logprob": F32, "entropy": entropy, "streams": streams, "o": o, "g_out": F32, "h_out": entropy,
            "table": F32, "num_rows": "i32", "BLOCK": scope_loss.BLOCK,
        }, {"num_warps": 4}  # fmt: skip
        for logits, dlogits, gradient in HEADS:
            operand = "*fp32" if dlogits == "*fp32" else "*bf16"
            yield linear_scope_loss._linear_scope_loss_kernel, f"{name} {logits[1:]} {dlogits[1:]} {gradient}", {
                "logits": logits, "dlogits": dlogits, "bias": operand if name == "full" else None, "target": "*i64",
                "streams": streams, "temperature": F32 if name == "full" else None, "index": "*i64", "o": o,
                "table": F32, "first": "i32", "num_rows": "i32", **vocabulary(name), "GRADIENT": gradient,
                "ENTROPY": name == "full", "BLOCK": softmax.BLOCK,
            }, {"num_warps": softmax.NUM_WARPS}  # fmt: skip
    for operand, in_place in itertools.product(DTYPES, (False, True)):
        yield linear_scope_loss._scale_kernel, f"{operand[1:]}{' in place' if in_place else ''}", {
            "x": operand, "factor": F32, "out": operand, "size": "i64:16", "IN_PLACE": in_place,
            "BLOCK": linear_scope_loss.SCALE_BLOCK,
        }, {"num_warps": 8}  # fmt: skip
    yield _reduce_table_kernel, "", {"table": F32, "out": F32, "num_columns": "i32", "BLOCK": 1024}, {"num_warps": 4}
    yield from logprob_variants()
    yield from pool_variants()
    wide, narrow = triton.language.float32, triton.language.bfloat16
    for source_type, target_type, aligned in ((wide, narrow, True), (wide, narrow, False), (narrow, wide, True)):
        yield weight_bucket._copy_kernel, f"{source_type} to {target_type}{'' if aligned else ' unaligned'}", {
            "table": "*i64", "num_tensors": "i32", "source_type": source_type, "target_type": target_type,
            "ALIGNED": aligned, "BLOCK": weight_bucket.BLOCK,
        }, {"num_warps": 8}  # fmt: skip


def logprob_variants():
    for name, bias, temperature in (("full", "*bf16", F32), ("bare", None, None)):
        rows = {"bias": bias, "target": "*i64", "temperature": temperature, "default": "fp32"}
        outputs = dict.fromkeys(("logprob", "entropy", "logsumexp", "state"), F32)
        for logits in (F32, "*bf16"):
            yield linear_logprob._row_stats_kernel, f"{name} {logits[1:]}", {
                "logits": logits, **rows, **outputs, "num_rows": "i32", **vocabulary(name, "size", "stride"),
                "BLOCK": softmax.BLOCK,
            }, {"num_warps": softmax.NUM_WARPS}  # fmt: skip
        grads = dict.fromkeys(("grad_logprob", "grad_entropy", "grad_logsumexp", "entropy", "state"), F32)
        for logits, dlogits in ((F32, "*bf16"), ("*bf16", "*bf16"), (F32, F32)):
            yield linear_logprob._dlogits_kernel, f"{name} {logits[1:]} {dlogits[1:]}", {
                "logits": logits, "dlogits": dlogits, **rows, **grads, "num_rows": "i32", "first": "i32",
                **vocabulary(name), "BLOCK": softmax.BLOCK,
            }, {"num_warps": softmax.NUM_WARPS}  # fmt: skip
        for operand, dtype in DTYPES.items():
            blocks = linear_logprob.stream_blocks(dtype, 4096 if name == "full" else 4095)
            launch = {k: blocks.pop(k) for k in ("num_warps", "num_stages")}
            sizes = dict.fromkeys(("num_rows", "size", "dim", "stride_h", "stride_w", "plane", "split_size"), "i32")
            sizes |= vocabulary(name, "size", "dim", "stride_h", "stride_w")
            yield linear_logprob._stream_kernel, f"{name} {operand[1:]}", {
                "hidden": operand, "weight": operand, **rows, "partial": F32, **sizes, **blocks,
            }, launch  # fmt: skip
    yield linear_logprob._merge_kernel, "", {
        "partial": F32, "target": "*i64", **outputs, "num_rows": "i32", "size": "i32", "plane": "i32",
        "num_splits": "i32", "BLOCK_T": 16, "SPLITS": linear_logprob.MERGED_SPLITS,
    }, {"num_warps": 4}  # fmt: skip


def pool_variants():
    for classes in (1, 2):
        for operand, dtype in DTYPES.items():
            yield step_pool._linear_score_kernel, f"C={classes} {operand[1:]}", {
                "hidden": operand, "step_end": "*i64", "weight": operand, "partial": F32, "dim": "i32",
                "stride_h": "i32", "stride_w": "i32", "C": classes, "BLOCK": step_pool.BLOCK_LINEAR,
            }, {"num_warps": 4}  # fmt: skip
            for num_steps, aligned in ((1, False), (step_pool.MANY_STEPS, True)):
                dims = ("dim", "width", "stride_h", "stride_m", "stride_w")
                sizes = {"num_steps": "i32", **dict.fromkeys(dims, "i32:16" if aligned else "i32")}
                blocks = step_pool.mlp_blocks(dtype, num_steps, aligned)
                launch = {"num_warps": blocks.pop("num_warps")}
                yield step_pool._mlp_score_kernel, f"C={classes} {operand[1:]} {num_steps}", {
                    "hidden": operand, "step_end": "*i64", "hidden_weight": operand, "hidden_bias": operand,
                    "weight": operand, "partial": F32, **sizes, "C": classes, **blocks,
                }, launch  # fmt: skip
        pools = dict.fromkeys(("low", "mean", "prod", "last"), F32)
        yield step_pool._verdict_kernel, f"C={classes}", {
            "partial": F32, "bias": "*bf16" if classes == 2 else None, "cu_steps": "*i64", "prob": F32,
            "first_error": "*i64", **pools, "num_steps": "i32", "num_tiles": "i32", "tau": "fp32", "positive": "i32",
            "C": classes, "BLOCK": step_pool.BLOCK_STEPS,
        }, {"num_warps": 1}  # fmt: skip


def source(kernel, arguments: dict, ones: bool) -> ASTSource:
    """The arguments as Triton's signature, constants and alignment; ones: every integer argument is 1."""
    signature, constants, attributes = {}, {}, {}

    def visit(value, path):
        if isinstance(value, tuple):
            return type(value)(*(visit(v, (*path, i)) for i, v in enumerate(value)))
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if ones and value.startswith("i32"):
            constants[path] = 1
            return "constexpr"
        if value.startswith("*") or value.endswith(":16"):
            attributes[path] = [["tt.divisibility", 16]]
        return value.removesuffix(":16")

    assert list(arguments) == kernel.arg_names, (kernel.__name__, list(arguments), kernel.arg_names)
    for i, (name, value) in enumerate(arguments.items()):
        signature[name] = visit(value, (i,))
    return ASTSource(kernel, signature, constants, attributes)


def resources(compiled, target: GPUTarget) -> dict:
    """Registers and spilled bytes, as the target's assembler reports them."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        return {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), "spills": spilled}
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        arch = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        ptxas = get_ptxas(target.arch).path
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", ptx.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))
    return {"registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]), "spills": spilled}


def main(names: list[str]) -> None:
    for kernel, variant, arguments, launch in variants():
        for name in names or TARGETS:
            if name != "sm_90" and "bare" in variant:
                continue
            target = TARGETS[name]
            compiled = triton.compile(source(kernel, arguments, False), target=target, options=launch)
            record = {"kernel": kernel.__name__, "variant": variant, "target": name, "shared": compiled.metadata.shared}
            ptx = compiled.asm.get("ptx", "")
            record["wide"] = [what for what in ("ld", "st") if f"{what}.global.v4.b32" in ptx]
            print(json.dumps(record | resources(compiled, target)), flush=True)
        triton.compile(source(kernel, arguments, True), target=TARGETS[(names or ["sm_90"])[0]], options=launch)


if __name__ == "__main__":
    main(sys.argv[1:])
