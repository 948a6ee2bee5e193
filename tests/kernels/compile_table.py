"""python tests/kernels/compile_table.py

Prints the table of docs/kernels.md: what ptxas makes of every kernel, in the specialisations that
the compile tests hold to their limits. Needs triton, but no GPU; takes a minute or two.
"""

import pathlib
import runpy
import sys

HERE = pathlib.Path(__file__).resolve().parent
MODULES = ("head/test_compile.py", "test_compile.py")
CAPABILITIES = (80, 90, 100)


def cell(report) -> str:
    """registers / stack bytes / 128-bit global loads + stores."""
    loads, stores = report.count(r"LDG(STS)?\..*128.*"), report.count(r"STG\..*128.*")
    return f"{report.registers} / {report.stack} / {loads} + {stores}"


def main() -> int:
    import triton

    compile_kernels = runpy.run_path(str(HERE / "compile_report.py"))["compile_kernels"]
    cases = {}
    for module in MODULES:
        found = runpy.run_path(str(HERE / module))["CASES"]
        cases |= {name: case for name, (case, *_) in found.items()}
    columns = [compile_kernels(list(cases.values()), capability) for capability in CAPABILITIES]
    heads = " | ".join(f"sm_{capability}" for capability in CAPABILITIES)
    print(f"Triton {triton.__version__}.\n\n| kernel | {heads} |\n|---|{'---|' * len(columns)}")
    for name, reports in zip(cases, zip(*columns, strict=True), strict=True):
        print(f"| {name} | {' | '.join(map(cell, reports))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
