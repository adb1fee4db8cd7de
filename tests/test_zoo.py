"""Networks of torchvision and timm by name."""

import pytest
import torch
import torchvision

from alexlab.models.zoo import alexnet_owt, load_but_head, timm_net, torchvision_net


def test_owt_is_torchvisions() -> None:
    theirs = torchvision.models.alexnet().eval()
    ours = alexnet_owt(1000).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(ours(images), theirs(images))


def test_weights_load_but_for_a_head_of_other_size() -> None:
    source = torchvision_net("resnet18", 5)
    net = torchvision_net("resnet18", 3)
    before = net.fc.weight.clone()
    load_but_head(net, source.state_dict())
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    assert torch.equal(net.fc.weight, before)
    with pytest.raises(ValueError, match="another network's"):
        load_but_head(net, {k: v for k, v in source.state_dict().items() if "layer1" not in k})


def test_unknown_names_and_weights_that_cannot_be_had(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"model.name=resnet19: torchvision has no such network. Did you mean resnet"):
        torchvision_net("resnet19", 3)
    with pytest.raises(ValueError, match=r"model.name=resnet19x: timm has no such network"):
        timm_net("resnet19x", 3)
    assert timm_net("resnet18", 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"the weights of hf-hub:timm/x cannot be had"):  # the hub's to know
        timm_net("hf-hub:timm/x", 3, pretrained=True)
    assert torchvision_net("googlenet", 3).transform_input
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r"pretrained=true: the weights of alexnet cannot be had .*Connect once, put"):
        alexnet_owt(10, pretrained=True)
