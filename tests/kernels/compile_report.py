"""Cross-compiles Triton kernels for NVIDIA targets without a GPU and reads what ptxas made of them.

A test module loads it with `runpy.run_path` (tests/ is not a package) and calls `compile_kernels`.
The compiler runs in a process of its own: the test process has TRITON_INTERPRET=1, under which
`@triton.jit` never compiles.
"""

import collections
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile


@dataclasses.dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as a launch on real tensors would make it.

    kernel: "package.module:function". types: argument -> Triton type ("*fp32", "i32", "fp32");
    arguments missing there must be in `constants` (tl.constexpr). unaligned: names of pointers and
    integers that are not known to be divisible by 16; everything else is taken as divisible.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    unaligned: tuple[str, ...] = ()
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class Report:
    """registers per thread; stack bytes per thread (spills live there); shared bytes per block,
    those of the launch included; SASS opcode -> static count, e.g. {"LDG.E.128": 2}."""

    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]

    def count(self, pattern: str) -> int:
        """Static instructions whose whole opcode matches the regular expression."""
        return sum(n for op, n in self.opcodes.items() if re.fullmatch(pattern, op))


def compile_kernels(cases: list[Case], capability: int) -> list[Report]:
    """Compiles each case for one compute capability (80, 90, 100); one subprocess for them all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    request = json.dumps([capability, [dataclasses.asdict(case) for case in cases]])
    done = subprocess.run(
        [sys.executable, __file__], input=request, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Report(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def _compile(case: Case, capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {arg: case.types.get(arg, "constexpr") for arg in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith(("*", "i")) and arg not in case.unaligned
    }
    source = ASTSource(kernel, signature, constexprs=case.constants, attrs=divisible)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


def _inspect(compiled) -> Report:
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [tools / "cuobjdump", flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    field = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = collections.Counter(
        re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    )
    stack = field["STACK"] + field["LOCAL"]
    return Report(field["REG"], stack, compiled.metadata.shared, dict(opcodes))


if __name__ == "__main__":
    wanted_capability, wanted_cases = json.load(sys.stdin)
    found = [_inspect(_compile(Case(**case), wanted_capability)) for case in wanted_cases]
    print(json.dumps([dataclasses.asdict(report) for report in found]))
