"""Ahead-of-time compilation: the reading of assembly, the limits, and small kernels compiled here without a GPU."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels import assembly, compile
from kernels.assembly import Instruction, Loop
from kernels.compile import MODULES, SHARED_LIMIT, Resources, Result, Variant

ROOT = Path(__file__).parent.parent

# An outer loop (L_0) over a loop with matrices (L_1) and a masked one (L_3). The loop L_1 waits at L_5, behind the end,
# from where it goes on in its middle (L_2). Behind everything is the padding that no path reaches.
SASS = """
	.section	.text._kernel,"ax",@progbits
_kernel:
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P1 EXIT ;
.L_0:
        /*0020*/                   STL [R1+0x8], R18 ;
.L_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR6], R7 ;
        /*0040*/              @!P5 BRA `(.L_5) ;
.L_2:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], RZ, !UPT ;
        /*0060*/                   MUFU.EX2 R4, R5 ;
        /*0070*/                   MUFU.EX2 R4, R6 ;
        /*0080*/               @P0 BRA `(.L_1) ;
.L_3:
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], RZ, !UPT ;
        /*00a0*/                   LDL.LU R50, [R1+0x168] ;
        /*00b0*/               @P2 FSEL R1, R2, R3, P1 ;
        /*00c0*/                   MUFU.EX2 R4, R5 ;
        /*00d0*/                   MUFU.EX2 R4, R6 ;
        /*00e0*/                   MUFU.RCP R4, R6 ;
        /*00e1*/                   FFMA R1, R2, R3, R4 ;
        /*00e2*/                   FFMA R1, R2, R3, R4 ;
        /*00e3*/                   FFMA R1, R2, R3, R4 ;
        /*00e4*/                   FFMA R1, R2, R3, R4 ;
        /*00f0*/                   BRA.U UP0, `(.L_3) ;
        /*0100*/             @!UP2 BRA `(.L_0) ;
        /*0110*/                   STL.64 [R1+0x188], R18 ;
        /*0120*/                   EXIT ;
.L_5:
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR6], R7 ;
        /*0140*/              @!P5 BRA `(.L_5) ;
        /*0150*/                   BRA `(.L_2) ;
.L_6:
        /*0160*/                   BRA `(.L_6);
        /*0170*/                   NOP ;
.L_7:
"""

AMDGCN = """
	.text
_kernel:                                ; @_kernel
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	buffer_store_dword v26, off, s[20:23], 0 offset:4 ; 4-byte Folded Spill
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 13 20 is_stmt 1               ; kernel.py:13:20
	v_mfma_f32_32x32x8_bf16 v[32:47], v[48:49], v[132:133], 0
	scratch_load_dword v1, off, s0          ; 4-byte Folded Reload
	v_exp_f32_e32 v106, v101
	s_waitcnt lgkmcnt(0)
	s_cbranch_vccnz .LBB0_2
	s_branch .LBB0_3
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.size	_kernel, .Lfunc_end0-_kernel
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     154
"""


# ---- reading assembly


def test_sass_loops():
    outer, masked, main, wait = sorted(assembly.loops(assembly.read_sass(SASS)), key=lambda loop: -loop.instructions)
    # the main loop has the wait behind the end, and that alone is a loop too; the padding is none
    assert outer == Loop(22, 2, 4, 2, innermost=False)
    assert main == Loop(9, 1, 2, 0, innermost=True)
    assert masked == Loop(11, 1, 2, 1, innermost=True)
    assert wait == Loop(2, 0, 0, 0, innermost=True)


def test_sass_kinds():
    assert assembly.matrix_kinds(assembly.read_sass(SASS)) == {"HGMMA": 2}
    names = {
        "UTCHMMA.2CTA": "UTCMMA",
        "HMMA.16816.F32.BF16": "HMMA",
        "v_mfma_f32_32x32x8_bf16": "MFMA",
        "FFMA": None,
        "UTMALDG.2D": None,
    }
    assert {name: Instruction(name).matrix for name in names} == names


def test_amdgcn_loop():
    listing = assembly.read_amdgcn(AMDGCN)
    assert len(listing) == 10
    assert assembly.loops(listing) == [Loop(5, 1, 1, 1, innermost=True)]
    assert assembly.matrix_kinds(listing) == {"MFMA": 1}


def test_nothing_to_read():
    assert assembly.loops(assembly.read_sass("")) == []


def test_inner_loop():
    found = assembly.loops(assembly.read_sass(SASS))
    # both inner loops have two exponentials: the one without masks is smaller
    assert compile.inner_loop(found, 2) == Loop(9, 1, 2, 0, innermost=True)
    # no loop but the outer one has four
    assert compile.inner_loop(found, 4) == Loop(22, 2, 4, 2, innermost=False)
    # none has more, or they do not count: of the innermost loops with matrices the largest
    assert compile.inner_loop(found, 64) == compile.inner_loop(found, None) == Loop(11, 1, 2, 1, innermost=True)
    plain = [Loop(3, 0, 0, 0, innermost=True), Loop(30, 0, 0, 0, innermost=True), Loop(40, 0, 0, 0, innermost=False)]
    assert compile.inner_loop(plain, None) == plain[1]
    assert compile.inner_loop([], 2) is None


# ---- limits


def result(no_spill: bool = False, **changes) -> Result:
    given = {
        "registers": 128,
        "accumulation_registers": None,
        "scalar_registers": None,
        "spill_bytes": 0,
        "shared": 227 * 1024,
        "shared_limit": SHARED_LIMIT["sm_90"],
        "tensor_memory": None,
        "matrix": {"HGMMA": 16},
        "loop_instructions": 500,
        "per_score": 8.0,
        "local_in_loop": 0,
        "local_in_other_loops": 0,
        "warnings": [],
    }
    return Result("op", "a tile", "sm_90", 4, 2, no_spill, Resources(**given | changes), None, 1.0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, None),
        ({"shared": 227 * 1024 + 16}, "232464 bytes of shared memory, over the limit of 232448"),
        ({"tensor_memory": 512}, None),
        ({"tensor_memory": 1024}, "1024 columns"),
        ({"spill_bytes": 64, "local_in_loop": 9}, None),
        ({"spill_bytes": 68}, "68 bytes of spills, over the limit of 64"),
        ({"no_spill": True, "spill_bytes": 68}, None),
        ({"no_spill": True, "spill_bytes": 4, "local_in_loop": 1}, "1 loads and stores"),
        ({"no_spill": True, "spill_bytes": 4, "local_in_loop": None}, "no loop was found"),
        ({"no_spill": True, "local_in_loop": None}, None),
    ],
)
def test_limits(changes, said):
    problems = result(**changes).problems()
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


def test_markdown():
    failed = Result("op", "bad", "gfx942", 4, 2, False, None, "ValueError: a | b\nsecond line", 1.0)
    lines = compile.as_markdown([result(), result(spill_bytes=68), failed]).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["## sm_90", "## gfx942"]
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 7
    assert len({row.count("|") for row in rows}) == 1
    assert "| **68 bytes of spills, over the limit of 64** |" in rows[3]
    assert "does not compile: ValueError: a b second line" in rows[6]


# ---- processes


def variant(label: str) -> Variant:
    return Variant("op", label, None, {}, {}, (), 4, 2)


def test_processes(monkeypatch):
    """Results come in the order of the jobs; a compiler that fails, dies or hangs costs its own variant only."""

    def compile_variant(variant, architecture):
        if variant.label == "dies":
            os.write(2, b"LLVM ERROR: no such thing\n")
            os._exit(134)
        if variant.label == "hangs":
            time.sleep(60)
        if variant.label == "fails":
            raise ValueError("not this one")
        return result().resources

    monkeypatch.setattr(compile, "compile_variant", compile_variant)
    labels = ["hangs", "dies", "fails", "compiles"]
    told = []
    results = compile.compile_all([("sm_90", variant(x)) for x in labels], 2, timeout_s=3.0, done=told.append)
    assert [r.label for r in results] == labels
    assert [r.label for r in told][-1] == "hangs"
    errors = [r.error for r in results]
    assert re.fullmatch(r"not done after \d+ s", errors[0])
    assert errors[1] == "the compiler ended with exit code 134; LLVM ERROR: no such thing"
    assert errors[2:] == ["ValueError: not this one", None]
    assert results[3].resources == result().resources


@pytest.mark.interpreter
def test_refuses_to_compile_where_kernels_are_interpreted():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile.shipped("sm_90")


def test_unknown_architecture():
    with pytest.raises(ValueError, match="'sm_75'; it must be one of sm_80"):
        compile.shipped("sm_75")


# ---- kernels compiled here


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Python code in a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


REPORT = (
    "import sys; from scripts import kernel_report as k; sys.exit(k.main(sys.argv[1:], ['compiled_kernels', 'nope']))"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The script over tests/compiled_kernels.py, and the folder of its files."""
    folder = tmp_path_factory.mktemp("report") / "new"
    return run(REPORT, "--arch", "sm_90", "gfx942", "--out", str(folder), "--workers", "2", "--check"), folder


@pytest.fixture(scope="module")
def rows(report) -> dict[tuple[str, str], dict]:
    """By architecture and label."""
    done, folder = report
    assert done.returncode == 1, done.stderr
    (path,) = folder.glob("triton-*.json")
    return {(r["architecture"], r["label"]): r for r in json.loads(path.read_text())["results"]}


def test_a_kernel_that_fits(rows):
    for architecture, kind, least, most in (("sm_90", "HGMMA", 6, 11), ("gfx942", "MFMA", 8, 25)):
        row = rows[architecture, "fits"]
        used = row["resources"]
        assert row["problems"] == []
        assert set(used["matrix"]) == {kind}
        assert 64 <= used["registers"] <= 255
        assert used["spill_bytes"] == used["local_in_loop"] == 0
        # q k^T and p v take exponentials, maxima, sums, casts: some instructions for each score
        assert least < used["per_score"] < most
        tile = 64 if architecture == "sm_90" else 32
        scores = 128 * tile / (4 * (32 if architecture == "sm_90" else 64))
        assert used["per_score"] == pytest.approx(used["loop_instructions"] / scores, abs=0.01)
        assert used["shared"] >= 2 * tile * 64  # bytes: a tile of keys, at least
    assert rows["gfx942", "fits"]["resources"]["scalar_registers"] > 0


def test_a_kernel_that_spills(rows):
    for architecture in ("sm_90", "gfx942"):
        row = rows[architecture, "spills"]
        used = row["resources"]
        assert used["registers"] == 64  # all that its options let it have
        assert used["spill_bytes"] > 64
        assert used["local_in_loop"] > 0
        # More than where nothing spills; Triton 3.6 counted 3 % fewer for gfx942.
        least = 0.9 if architecture == "gfx942" else 1.0
        assert used["per_score"] > least * rows[architecture, "fits"]["resources"]["per_score"]
        assert ["bytes of spills, over the limit of 64" in p for p in row["problems"]] == [True]
        marked = rows[architecture, "spills and must not"]
        assert ["loads and stores of spilled registers" in p for p in marked["problems"]] == [True]
    assert any("wgmma" in warning for warning in rows["sm_90", "spills"]["resources"]["warnings"])


def test_a_kernel_with_descriptors(rows):
    tile_bytes = 2 * (128 * 64 + 64 * 128)
    fits, over = rows["sm_90", "three stages"], rows["sm_90", "nine stages"]
    assert 3 * tile_bytes <= fits["resources"]["shared"] < 3 * tile_bytes + 1024
    assert fits["problems"] == []
    assert over["resources"]["shared"] >= 9 * tile_bytes > SHARED_LIMIT["sm_90"]
    assert ["shared memory" in p for p in over["problems"]] == [True]
    assert set(fits["resources"]["matrix"]) == {"HGMMA"}
    assert fits["resources"]["per_score"] is None


def test_a_kernel_without_matrices(rows):
    for architecture in ("sm_90", "gfx942"):
        used = rows[architecture, "sum"]["resources"]
        assert used["matrix"] == {}
        assert used["loop_instructions"] > 4
        assert used["per_score"] is None


def test_a_wrong_variant_is_an_error(rows):
    assert "['num_ctaz'] mean nothing on sm_90" in rows["sm_90", "misspelled"]["error"]


def test_what_the_script_says(report, rows):
    done, folder = report
    (table,) = folder.glob("triton-*.md")
    assert done.stdout.strip() == table.read_text().strip()
    assert table.stem in done.stdout.replace("Triton ", "triton-")
    assert f"[{len(rows)}/{len(rows)}]" in done.stderr
    assert "nope has no variants(architecture): none of it is compiled" in done.stderr
    assert "sm_90 attend spills: 2" in done.stderr


def test_a_broken_promise_fails_without_being_asked_for():
    """The limits of the others are looked at with --check only."""
    assert run(REPORT, "--arch", "sm_90", "--op", "sum").returncode == 0
    done = run(REPORT, "--arch", "sm_90", "--op", "attend")
    assert done.returncode == 1 and "spills and must not" in done.stderr


def test_script_on_an_operation_that_is_not_there():
    done = run(REPORT, "--arch", "sm_90", "--op", "atend")
    assert done.returncode == 2
    assert "--op is 'atend'; there are kernels of: attend, sum, tma" in done.stderr


def test_arguments_are_checked():
    code = """
import dataclasses, compiled_kernels as toys
from kernels import compile
good = toys.attend("toy", 64)
for changes in (
    {"signature": dict(good.signature, X="*bf16")},
    {"constants": {"D": 64}},
    {"divisible": ("D",)},
    {"divisible": ("scale",)},
    {"constants": dict(good.constants, scale=1.0)},
    {"kernel": print},
):
    try:
        compile.compile_variant(dataclasses.replace(good, **changes), "sm_90")
    except ValueError as e:
        print(e)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, name in zip(lines, ("['X']", "['BLOCK_M', 'BLOCK_N']", "['D']", "['scale']", "['scale']"), strict=False):
        assert f"arguments {name} are unknown, given twice or missing" in line
    assert "kernel is builtin_function_or_method" in lines[5]


def test_every_kernel_is_among_the_variants():
    """Every `_..._kernel` of every file, on some architecture: what the report leaves out, nobody looks at."""
    files = [path for path in (ROOT / "kernels").glob("*.py") if "triton.jit" in path.read_text()]
    written = {
        f"kernels.{path.stem}.{node.name}"
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    code = """
from kernels.compile import SHARED_LIMIT, shipped
for architecture in SHARED_LIMIT:
    for v in shipped(architecture)[0]:
        print(f"{v.kernel.fn.__module__}.{v.kernel.fn.__name__}")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert written <= set(done.stdout.split())


def test_modules_are_where_variants_are():
    offering = {
        f"kernels.{path.stem}"
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "variants"
    }
    assert offering <= set(MODULES)
