"""Grad-CAM, on networks of which it is known where they look."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from alexlab.analysis import cam
from alexlab.engine.errors import UserError
from alexlab.models.alexnet import AlexNet
from alexlab.models.introspection import last_maps

pytest.importorskip("captum")


class RedOrBlue(nn.Module):
    """Says how much red, and how much blue an image has, from the means of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 3, padding=1), nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.first.weight[range(3), range(3)] = 1
            self.second.weight[0, 0], self.second.weight[1, 2] = 1, 1
            self.head.weight.copy_(torch.eye(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(images)).relu().mean((2, 3)))


def test_the_map_of_a_class_lies_on_the_shape_of_this_class() -> None:
    images = torch.zeros(1, 3, 64, 64)
    images[0, 0, 8:24, 8:24] = 1  # a red square
    images[0, 2, 40:56, 32:56] = 1  # a blue rectangle
    red, blue = cam.grad_cam(RedOrBlue().eval(), images.expand(2, -1, -1, -1), torch.tensor([0, 1]))
    for found, (rows, columns) in ((red, (slice(7, 25), slice(7, 25))), (blue, (slice(39, 57), slice(31, 57)))):
        assert found[rows, columns].sum() / found.sum() > 0.99
        assert found.max() == 1


def test_the_map_moves_with_the_image_for_alexnet_and_a_resnet() -> None:
    for net, size in ((AlexNet(5), 227), (torchvision.models.resnet18(num_classes=5), 224)):
        found = cam.grad_cam(net.eval(), torch.randn(2, 3, size, size), torch.tensor([1, 4]))
        assert found.shape == (2, size, size)
        assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize(
    ("name", "layer"),
    [("alexnet", "features.11"), ("resnet18", "layer4"), ("densenet121", "features"), ("googlenet", "inception5b")],
)
def test_the_last_maps_of_torchvisions_networks(name: str, layer: str) -> None:
    net = torchvision.models.get_model(name, **({"init_weights": False} if name == "googlenet" else {})).eval()
    assert last_maps(net, torch.zeros(1, 3, 224, 224)) is net.get_submodule(layer)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "convnext_atto", "nfnet_l0"])
def test_the_last_maps_of_timms_networks_have_a_size(name: str) -> None:
    net = pytest.importorskip("timm").create_model(name, num_classes=3).eval()
    found = cam.grad_cam(net, torch.randn(1, 3, 128, 128), torch.tensor([2]))
    assert found.shape == (1, 128, 128)


def test_a_network_without_maps_is_refused() -> None:
    net = torchvision.models.vit_b_32(num_classes=3).eval()
    with pytest.raises(
        UserError, match=r"^Grad-CAM needs at least two convolutions, .* VisionTransformer has none such: vision"
    ):
        cam.grad_cam(net, torch.zeros(1, 3, 224, 224), torch.tensor([0]))


def test_the_overlay_is_bright_where_the_map_is() -> None:
    found = torch.zeros(8, 8)
    found[2:4, 5:7] = 1
    laid = cam.overlay(np.full((8, 8, 3), 100, np.uint8), found).sum(2)
    assert (laid[2:4, 5:7] > laid[0, 0]).all()
    assert laid[0, 0] == laid[7, 7]
