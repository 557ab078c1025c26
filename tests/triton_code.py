"""Prints what Triton's compiler makes of the kernels for an H100 or H200, for `test_triton`; no GPU is needed."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from manic.kernels import fused
from manic.kernels import triton as passes

DOUBLES = ("partial", "corrections", "rows", "weights")
SHAPE = {"CHUNK": passes.CHUNK, "BLOCK": passes.BLOCK}
FLOAT32 = {"X": tl.float32, "WIDE": tl.float32, "STORED": True, "ALIGNED": True, **SHAPE}
HALF = {**FLOAT32, "X": tl.bfloat16}
ADAMW = {"ADAM": True, "DECOUPLED": True, "MOMENTUM": False, "NESTEROV": False, "S": tl.float32, "G": tl.float32}
SGD = {**ADAMW, "ADAM": False, "DECOUPLED": False, "MOMENTUM": True}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sums": (passes._sums, {**FLOAT32, "G": tl.float32, "CARRIED": False}),
    "carried sums": (passes._sums, {**FLOAT32, "G": tl.float32, "CARRIED": True}),
    "move": (passes._move, FLOAT32),
    "move, bfloat16": (passes._move, HALF),
    "adamw": (fused._step, {**FLOAT32, **ADAMW}),
    "adamw, bfloat16": (fused._step, {**HALF, **ADAMW, "G": tl.bfloat16}),
    "sgd": (fused._step, {**FLOAT32, **SGD}),
}


def kind(name: str, constants: dict[str, Any]) -> str:
    """The type of a kernel's argument."""
    if name in constants:
        return "constexpr"
    if name in DOUBLES:
        return "*fp64"
    return {"finite": "*u8", "restart": "*u8", "before": "*fp32"}.get(name, "*i64")


def main() -> None:
    code = {}
    for case, (kernel, constants) in CASES.items():
        signature = {name: kind(name, constants) for name in kernel.arg_names}
        aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name] != "constexpr"]
        source = ASTSource(
            kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
        )
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=passes.LAUNCH)
        code[case] = Counter(re.findall(r"\b(?:ld|st)\.global[.\w]*|\b(?:fma|cvt)\.[.\w]*", compiled.asm["ptx"]))
    print(json.dumps(code))


if __name__ == "__main__":
    main()
