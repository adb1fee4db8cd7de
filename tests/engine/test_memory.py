"""Freed memory is kept by glibc, and a user's own settings are left alone."""

import subprocess
import sys

import pytest
from conftest import clean_env

CODE = """
import resource
from alexlab.engine.memory import keep_memory
kept = keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(b"x") * 50_000_000  # allocated, written, freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def run(**env: str) -> tuple[bool, int]:
    clean = {k: v for k, v in clean_env().items() if not k.startswith(("MALLOC_", "GLIBC_TUN", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=clean | env, capture_output=True, text=True, check=True
    ).stdout.split()
    return done[0] == "True", int(done[1])


def test_memory_is_kept_where_glibc_allocates() -> None:
    kept, faults = run()
    if not kept:
        pytest.skip("this system's allocator is not glibc's")
    plain, faults_without = run(MALLOC_ARENA_MAX="4")  # a setting of the user's
    assert not plain
    assert faults_without > 20 * 100, "each of 20 blocks of 50 MB is allocated again, in pages of 4 KB or 2 MB"
    assert faults < faults_without / 10
