"""Networks of torchvision and timm by name."""

import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import command
from safetensors.torch import save_file

from alexlab.models import pretrained as pretrained_nets
from alexlab.models.alexnet import AlexNet
from alexlab.models.introspection import first_convolution, normalization
from alexlab.models.pretrained import alexnet_owt, change_channels, load_but_head, timm_net, torchvision_net


def test_alexnet_owt_equals_torchvisions_alexnet() -> None:
    theirs = torchvision.models.alexnet().eval()
    ours = alexnet_owt(1000).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(ours(images), theirs(images))


def test_weights_load_except_a_head_of_another_size() -> None:
    source = torchvision_net("resnet18", 5)
    net = torchvision_net("resnet18", 3)
    before = net.fc.weight.clone()
    load_but_head(net, source.state_dict())
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    assert torch.equal(net.fc.weight, before)
    with pytest.raises(ValueError, match=r"another network's: layer1.2.conv1.weight"):
        load_but_head(net, torchvision_net("resnet34", 3).state_dict())
    with pytest.raises(ValueError, match=r"another network's: classifier.0.weight do not fit"):  # fc6, not the head
        load_but_head(AlexNet(3, hidden=(16, 16)), AlexNet(3, hidden=(16, 16), map_size=5).state_dict())
    inception = torchvision_net("inception_v3", 3)
    load_but_head(inception, torchvision.models.inception_v3(aux_logits=True, init_weights=False).state_dict())
    with pytest.raises(ValueError, match="another network's"):
        load_but_head(net, {k: v for k, v in source.state_dict().items() if "layer1" not in k})


def test_unknown_names_and_unavailable_weights_are_refused(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"model.name=resnet19: torchvision has no such network. Did you mean resnet"):
        torchvision_net("resnet19", 3)
    with pytest.raises(ValueError, match=r"model.name=resnet19x: timm has no such network"):
        timm_net("resnet19x", 3)
    assert timm_net("resnet18", 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert timm_net("resnet18", 3, in_channels=1)(torch.zeros(2, 1, 64, 64)).shape == (2, 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for pretrained in (True, False):
        with pytest.raises(ValueError, match=r"model.name=hf-hub:timm/x: its files are not available \(.*choose an"):
            timm_net("hf-hub:timm/x", 3, pretrained=pretrained)
    with pytest.raises(ValueError, match=r"model.name=resnet18: its files .*, or set model.pretrained=false"):
        timm_net("resnet18", 3, pretrained=True)
    missing = str(pretrained_nets._not_available("gcvit_xxtiny", OSError("offline")))  # not on the hub
    assert "put https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-m" in missing
    with pytest.raises(ValueError, match=r"model.name=resnet18.nosuch: Invalid pretrained tag"):
        timm_net("resnet18.nosuch", 3)
    with pytest.raises(ValueError, match=r"model.name=resnet18: .*unexpected keyword argument 'foo'"):
        timm_net("resnet18", 3, foo=1)
    assert torchvision_net("googlenet", 3).transform_input
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no server is there
    with pytest.raises(ValueError, match=r"pretrained=true: the weights of alexnet are not available .*Connect"):
        alexnet_owt(10, pretrained=True)


def test_a_cached_file_of_torchvision_must_be_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"others")
    found = hashlib.sha256(b"others").hexdigest()[:8]
    with pytest.raises(ValueError, match=f"not the published file: its SHA-256 begins with {found}, not with 7be5be79"):
        alexnet_owt(10, pretrained=True)


@pytest.mark.parametrize(
    ("option", "name", "address"),
    [
        ("torchvision", "shufflenet_v2_x0_5", "https://download.pytorch.org/models/shufflenetv2_x0.5-f707e7126e.pth"),
        ("timm", "mobilenetv3_small_050", "https://huggingface.co/timm/mobilenetv3_small_050.lamb_in1k/resolve/main/"),
    ],
)
def test_offline_the_message_names_the_file_and_its_place(
    option: str, name: str, address: str, shapes: Path, tmp_path: Path
) -> None:
    """A file that is put there is read; torchvision's must be the published one."""
    env = {"HOME": str(tmp_path), "TORCH_HOME": "", "HF_HOME": "", "HF_ENDPOINT": "", "HF_HUB_CACHE": ""}
    env |= {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""}
    words = ["data=folder", f"data.root={shapes}", f"model={option}", f"model.name={name}", "model.pretrained=true"]
    words += ["data.image_size=224", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}/run", "dry_run=true"]
    done = command("train.py", *words, env=env)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    found = re.search(
        r"Connect to the network once, put (\S+) (into|at) (\S+), or set model.pretrained=false", done.stderr
    )
    assert found is not None, done.stderr
    assert found[1].startswith(address)
    assert found[3].startswith(str(tmp_path / ".cache"))
    assert not (tmp_path / "run").exists()
    file = Path(found[3]) if found[2] == "at" else Path(found[3], found[1].rpartition("/")[2])
    file.parent.mkdir(parents=True, exist_ok=True)
    net = timm.create_model(name) if option == "timm" else torchvision.models.get_model(name)
    torch.save(net.state_dict(), file) if file.suffix == ".pth" else save_file(net.state_dict(), file)
    done = command("train.py", *words, env=env)
    if option == "torchvision":
        assert "is not the published file: its SHA-256 begins with" in done.stderr, done.stdout
    else:
        assert done.returncode == 0, done.stderr


def test_timms_weights_are_read_from_the_hubs_cache_and_must_be_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    net = timm.create_model("mobilenetv3_small_050")
    cache = tmp_path / "hub" / f"models--{net.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    for folder in ("blobs", "refs", "snapshots/c0ffee"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs/main").write_text("c0ffee")
    save_file(net.state_dict(), tmp_path / "weights")
    blob = cache / "blobs" / hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    (tmp_path / "weights").rename(blob)
    (cache / "snapshots/c0ffee/model.safetensors").symlink_to(blob)
    loaded = timm_net("mobilenetv3_small_050", 3, pretrained=True)
    assert torch.equal(loaded.conv_stem.weight, net.conv_stem.weight)
    grey = timm_net("mobilenetv3_small_050", 3, pretrained=True, in_channels=1)
    torch.testing.assert_close(grey.conv_stem.weight, net.conv_stem.weight.sum(1, keepdim=True))
    held = bytearray(blob.read_bytes())
    held[-1] ^= 1
    blob.write_bytes(held)
    with pytest.raises(ValueError, match="is not the published file: its SHA-256 begins with"):
        timm_net("mobilenetv3_small_050", 3, pretrained=True)


def test_torchvisions_networks_have_the_input_statistics_of_their_weights() -> None:
    """All use those of ImageNet except one."""
    for name, mean in (("shufflenet_v2_x0_5", [0.485, 0.456, 0.406]), ("efficientnet_v2_l", [0.5, 0.5, 0.5])):
        with torch.device("meta"):
            assert torchvision_net(name, 3).pretrained_cfg["mean"] == mean


@pytest.mark.parametrize("in_channels", [1, 2, 4, 7])
def test_pretrained_weights_are_given_other_channels_as_timm_does_it(
    in_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm.models._manipulate import adapt_input_conv

    theirs = {
        "alexnet": torchvision.models.alexnet().state_dict(),
        "resnet18": torchvision.models.resnet18().state_dict(),
    }
    monkeypatch.setattr(pretrained_nets, "torchvision_weights", theirs.get)  # a download
    images = torch.randn(2, in_channels, 64, 64)
    for net, name, key in (
        (alexnet_owt(5, pretrained=True, in_channels=in_channels), "alexnet", "features.0.weight"),
        (torchvision_net("resnet18", 5, pretrained=True, in_channels=in_channels), "resnet18", "conv1.weight"),
    ):
        torch.testing.assert_close(net.state_dict()[key], adapt_input_conv(in_channels, theirs[name][key]))
        assert net(images).shape == (2, 5)
        if in_channels == 1:  # what the network of RGB computes of three equal channels
            rgb = torchvision_net(name, 5)
            rgb.load_state_dict(net.state_dict() | {key: theirs[name][key]})
            torch.testing.assert_close(
                net.eval()(images), rgb.eval()(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(
    "name",
    ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "resnet18",
     "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32"],
)  # fmt: skip
def test_each_family_of_torchvision_takes_grey_and_rgba(name: str) -> None:
    for in_channels in (1, 4):
        with torch.device("meta"):
            net = torchvision_net(name, 3, in_channels=in_channels)
            assert net.eval()(torch.empty(1, in_channels, 224, 224)).shape == (1, 3)
        found = first_convolution(net)
        assert found is not None
        assert found[0].in_channels == in_channels


def test_inputs_of_inception_without_its_conversion_are_from_minus_1_to_1() -> None:
    with torch.device("meta"):
        net = torchvision_net("inception_v3", 3, in_channels=1)
    assert normalization(net, in_channels=1) == ([0.5], [0.5])


def test_a_network_without_a_first_convolution_of_rgb_is_refused() -> None:
    for net in (torch.nn.Linear(3, 2), torch.nn.Conv2d(1, 2, 3)):
        with pytest.raises(ValueError, match=r"model.in_channels=4: (Linear|Conv2d) has no first convolution of RGB"):
            change_channels(net, 4)


def test_mean_and_std_of_grey_and_of_rgba_follow_from_those_of_rgb() -> None:
    net, rng = torch.nn.Identity(), torch.Generator().manual_seed(0)
    grey = normalization(net, in_channels=1)
    assert grey == ([pytest.approx(0.458971)], [pytest.approx(0.225609)])  # by hand from ImageNet's
    images = torch.rand(3, 1000, generator=rng)
    luma = torch.tensor([0.299, 0.587, 0.114]) @ images
    (mean,), (std,) = normalization(net, images.mean(1).tolist(), images.std(1).tolist(), 1)
    assert mean == pytest.approx(float(luma.mean()), abs=1e-6)
    assert std >= luma.std()
    together = torch.stack([luma, luma, luma])
    assert normalization(net, [0, 0, 0], together.std(1).tolist(), 1)[1] == [pytest.approx(float(luma.std()))]
    mean, std = normalization(net, in_channels=4)
    assert mean == [0.485, 0.456, 0.406, 1.0]
    assert std == [0.229, 0.224, 0.225, pytest.approx(0.226)]
    assert normalization(net, [0.1], [0.2], 1) == ([0.1], [0.2])
    assert normalization(net, [0.1] * 4, "auto", 4)[0] == [0.1] * 4
    assert normalization(net, [0.1] * 5, [0.2] * 5, 5) == ([0.1] * 5, [0.2] * 5)
