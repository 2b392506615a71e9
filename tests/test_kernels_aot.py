"""Every shipped tile compiles, for every architecture, within the rules of bench.aot."""

import os
import subprocess
import sys


def test_every_tile_compiles_within_the_rules() -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--check"], capture_output=True, text=True, env=environment
    )
    faults = "\n".join(line for line in result.stdout.splitlines() if "FAULT" in line)
    assert result.returncode == 0, faults + result.stdout[-200:] + result.stderr
    for architecture in ("sm_80", "sm_89", "sm_90", "sm_100"):
        assert f"{architecture} _dkdv_kernel" in result.stdout
