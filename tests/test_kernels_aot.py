"""Every kernel compiles within bench.aot's rules: every path through it for sm_90, one for the others."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.aot import Build, Figures, faults, instructions, waits_after_every_product
from kernels.op import Launch


def test_every_kernel_compiles_within_the_rules():
    """In a process of its own: Triton decides on import whether it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--check", "--quick"],
        capture_output=True,
        text=True,
        env=environment,
    )
    broken = "\n".join(line for line in result.stdout.splitlines() if "FAULT" in line)
    assert result.returncode == 0, broken + result.stdout[-200:] + result.stderr
    for architecture in ("sm_80", "sm_89", "sm_90", "sm_100"):
        assert f"{architecture} _attention_dkdv_kernel" in result.stdout


GOOD = Figures(
    registers=128,
    stack=0,
    spills=0,
    loop_spills=0,
    shared=99 << 10,
    tensor_memory=0,
    instructions=500,
    loop_instructions=300,
    tensor_core={"HMMA": 8, "HGMMA": 8, "UTCHMMA": 8},
    expected=8,
    one_by_one=False,
    wide_loads=2,
    blocks=2,
    occupancy=0.25,
)


@pytest.mark.parametrize(
    ("architecture", "change", "sentence"),
    [
        (80, {"loop_spills": 2}, "2 spills in loops of 300 instructions"),
        (90, {"tensor_core": {"HMMA": 64}}, "8 HGMMA are expected"),
        (100, {"tensor_core": {"UTCHMMA": 7}}, "8 UTCHMMA are expected"),
        (89, {"shared": (99 << 10) + 1}, "bytes of shared memory"),
        (100, {"tensor_memory": 513}, "513 columns of tensor memory"),
        (100, {"instructions": 4}, "a body of 4 instructions"),
        (80, {"wide_loads": 0}, "no load of 16 bytes"),
        (90, {"one_by_one": True}, "one by one"),
        (80, {"blocks": 0}, "not one block fits"),
    ],
)
def test_rules(architecture, change, sentence):
    build = Build(architecture, Launch(None, {}, num_warps=4, num_stages=1))
    assert not faults(build, GOOD)
    assert not faults(build, replace(GOOD, loop_spills=1))
    (fault,) = faults(build, replace(GOOD, **change))
    assert sentence in fault


def test_waits_after_every_product_are_seen():
    product, wait = "HGMMA.64x64x16.F32.BF16", "WARPGROUP.DEPBAR.LE"
    assert waits_after_every_product([product, "MOV", wait, product, wait])
    assert not waits_after_every_product([product, wait, product, "MOV", product, wait])
    assert not waits_after_every_product(["HMMA.16816.F32.BF16", "HMMA.16816.F32.BF16"])


def test_loops_are_seen_in_sass():
    """A spill before the loop is outside, one between the label and the branch back to it inside."""
    sass = """
        /*0000*/                   STL [R1], R2 ;
.L_x_1:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   BRA `(.L_x_2);
    """
    names = [(line.split()[0], inside) for line, inside in instructions(sass)]
    assert names == [("STL", False), ("LDL", True), ("BRA", True), ("EXIT", False), ("BRA", False)]
