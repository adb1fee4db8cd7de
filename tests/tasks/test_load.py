"""Trained networks from their runs, and whether weights fit a network."""

from pathlib import Path

import pytest
import torch
from torch import nn

from alexlab.engine.errors import UserError
from alexlab.tasks import load as loading


def test_weights_of_another_network_are_refused_with_the_keys_that_differ() -> None:
    state = {"state_dict": {"net.weight": torch.zeros(3, 3), "net.extra": torch.zeros(1)}, "alexlab": {}}
    message = r"(?s)another network.*Missing .*bias.*Unexpected .*extra.*size mismatch for weight"
    with pytest.raises(UserError, match=message):
        loading.load_net(nn.Linear(3, 2), state, Path("x.ckpt"))
