"""One process group of one rank, for tests that build a model in the test process."""

from __future__ import annotations

import pytest
import torch

from parallel import comm


@pytest.fixture(scope="module")
def lone_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    comm.init_process_group(
        device=torch.device("cpu"), rank=0, world_size=1, timeout_s=30, init_method=f"file://{store}"
    )
    yield
    comm.shutdown()
