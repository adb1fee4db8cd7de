"""Two machines and a real SLURM for the tests of this folder: `make clusters`."""

import shutil
from collections.abc import Iterator

import pytest
from machines import SLURM, Cluster, Machines, missing, slurm, two_machines


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if lacking := missing():
        pytest.skip(f"two network namespaces need {lacking}")
    with two_machines(tmp_path_factory.mktemp("machines")) as both:
        yield both


@pytest.fixture(scope="session")
def cluster(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := [tool for tool in SLURM if shutil.which(tool) is None]:
        pytest.skip(f"SLURM is not installed: {', '.join(lacking)} (apt-get install slurm-wlm munge)")
    with slurm(machines, tmp_path_factory.mktemp("slurm")) as env:
        yield Cluster(machines, env)
