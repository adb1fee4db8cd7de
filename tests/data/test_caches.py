"""Images that are cropped or kept on the device, or kept in memory: the same batches as without."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, photo, summary_of, tiny_train
from PIL import Image

from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import Batch
from alexlab.data.decode import BrokenImageError
from alexlab.data.fast import prepared
from alexlab.data.fast.caches import check_fits
from alexlab.data.fast.ram_cache import PER_IMAGE, RamCache, _left_in_groups, memory_at_hand
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

SIDE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds that are decoded in their own way, a class each: small and large JPEGs, turned ones, a PNG, a GIF in
    colours of a palette, CMYK, and two JPEGs that end too early or hold a blemish near their end."""
    root = tmp_path_factory.mktemp("photos")
    turned = Image.Exif()
    turned[0x0112] = 6
    for split in ("train", "val"):
        folder = root / split
        for i, size in enumerate([(40, 36), (90, 200), (300, 260), (700, 500), (1000, 1100)]):
            photo(folder / f"plain{i}" / "x.jpg", size, seed=i)
            photo(folder / f"turned{i}" / "x.jpg", size, seed=10 + i, exif=turned)
        photo(folder / "png" / "x.png", (333, 222), seed=30)
        photo(folder / "gif" / "x.gif", (210, 200), seed=31)
        photo(folder / "cmyk" / "rgb.jpg", (300, 200), seed=32)
        with Image.open(folder / "cmyk" / "rgb.jpg") as image:
            image.convert("CMYK").save(folder / "cmyk" / "x.jpg")
        (folder / "cmyk" / "rgb.jpg").unlink()
        content = photo(folder / "blemish" / "x.jpg", (400, 400), seed=33).read_bytes()
        (folder / "blemish" / "x.jpg").write_bytes(content[:-300] + bytes(20) + content[-280:])
    cut = photo(root / "train" / "cut" / "x.jpg", (400, 400), seed=34)
    cut.write_bytes(cut.read_bytes()[:-500])
    photo(root / "val" / "cut" / "x.jpg", (400, 400), seed=35)
    return root


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw squares of 40 pixels in shards of a few images each."""
    root = tmp_path_factory.mktemp("squares")
    for split, count in (("train", 30), ("val", 11)):
        for i in range(count):
            photo(root / "photos" / split / f"{i % 3}" / f"{i}.jpg", (60 + i, 50), seed=i)
    words = [f"data.root={root / 'photos'}", f"out={root / 'out'}", "format=raw", "square=true", "short_side=40"]
    done = command("prepare.py", *words, "shard_mb=0.03")
    assert done.returncode == 0, done.stderr
    assert len(list((root / "out").glob("train-*.shard"))) > 3
    return root / "out"


def data_of(
    root: Path, workers: int = 0, policy: str = "none", crop: str = "random_resized", **more: object
) -> ImageFolders:
    settings = {"batch_size": 5, "seed": 3, "num_workers": workers, "on_error": "skip"} | more
    train = SampleTransform(SIDE, crop, flip=0.5, policy=policy)
    return ImageFolders(str(root), train_transform=train, eval_transform=SampleTransform(SIDE), **settings).read()  # type: ignore[arg-type]


def batches(data: ImageFolders, epochs: int = 3) -> list[Batch]:
    """Of some epochs, and of a validation after each."""
    loader, val = data.train_dataloader(), data.val_dataloader()
    found = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found += [*loader, *val]
    return [batch.to(torch.device("cpu")) for batch in found]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.skipped == b.skipped
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 3])
def test_memory_gives_the_same_batches_of_files(photos: Path, workers: int) -> None:
    kept = data_of(photos, workers, cache="ram")
    assert same(batches(data_of(photos)), batches(kept))
    cache = kept.keeping._in_ram["train"]
    assert (cache.kept != 0).any(1).sum() == len(cache.targets) - 2, "all but the two damaged ones"
    assert (cache.kept != 0).sum() > len(cache.targets), "some at several scales"


def test_memory_is_read_and_not_the_files_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(photos, cache="ram", crop="center")  # one scale an image
    expected = batches(data, 1)
    opened: list[str] = []
    read = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: (opened.append(str(path)), read(path, *more))[1])
    again = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    assert same(expected, again)
    assert {Path(path).parent.name for path in opened} == {"cut", "blemish"}


@pytest.mark.parametrize("cache", ["ram", "device", None])
@pytest.mark.parametrize("crop", ["random_resized", "random", "center"])
def test_whole_images_give_the_same_batches_kept_or_not(squares: Path, cache: str | None, crop: str) -> None:
    plain = batches(data_of(squares, crop_on="device", crop=crop))
    for workers in (0, 1, 2, 5):
        assert same(plain, batches(data_of(squares, workers, crop_on="device", cache=cache, crop=crop)))


def test_the_devices_crops_are_the_cpus_to_a_rounding(squares: Path) -> None:
    on_cpu, on_device = batches(data_of(squares)), batches(data_of(squares, crop_on="device"))
    for a, b in zip(on_cpu, on_device, strict=True):
        assert torch.equal(a.targets, b.targets)
        assert (a.images.int() - b.images.int()).abs().max() <= 2
    whole = next(iter(data_of(squares, crop_on="device").train_dataloader()))
    assert whole.images.shape == (5, 3, 40, 40), "and they are left whole until then"
    assert whole.cuts is not None
    assert whole.cuts.boxes.shape == (5, 9)


def test_ranks_together_have_the_images_that_one_would(squares: Path) -> None:
    one = batches(data_of(squares, crop_on="device", batch_size=6), 1)[:5]
    for cache in (None, "device"):
        data = data_of(squares, crop_on="device", batch_size=6, world_size=3, cache=cache)
        loaders = []
        for rank in range(3):
            loader = data.train_dataloader()
            loader.batch_sampler.rank = rank  # type: ignore[attr-defined]
            loaders.append([batch.to(torch.device("cpu")) for batch in loader])
        together = [
            Batch(torch.cat([b.images for b in step]), torch.cat([b.targets for b in step]), {})
            for step in zip(*loaders, strict=True)
        ]
        assert same(one, together)


def test_a_device_cache_begins_at_any_step(squares: Path) -> None:
    data = data_of(squares, crop_on="device", cache="device")
    loader = data.train_dataloader()
    whole = [batch.to(torch.device("cpu")) for batch in loader]
    loader.batch_sampler.begins_at = (0, 4)  # type: ignore[attr-defined]
    assert same(whole[4:], [batch.to(torch.device("cpu")) for batch in loader])
    assert len(loader) == len(whole)


def test_memory_that_is_full_says_so_and_keeps_what_it_has(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(photos, workers=2)
    expected = batches(data)
    data = data_of(photos, workers=2)
    room = 500_000
    data.keeping._in_ram = {split: RamCache(data.splits[split], room) for split in ("train", "val")}
    data.keeping.cache = "ram"
    with caplog.at_level(logging.WARNING, "alexlab"):
        assert same(expected, batches(data))
    cache = data.keeping._in_ram["train"]
    assert 0 < (cache.kept != 0).any(1).sum() < len(cache.targets)
    full = [text for text in caplog.messages if "is full with" in text]
    assert len(full) == 2, "once a split"
    assert full[0].startswith("data.cache=ram: the memory at hand, 0.0 GB, is full with ")
    assert full[0].endswith(f" of {len(cache.targets)} images; the others are read each time.")


def test_processes_share_the_memory(squares: Path, tmp_path: Path) -> None:
    """Another process finds what this one keeps, and this one what it writes; nothing is left in the file system."""
    index = prepared.read(squares)["train"]
    mine = RamCache(index, 1_000_000, ranks=2)
    expected = index.picture(0).pixels()[0]
    mine.picture(0).pixels()
    code = f"""
import sys, pathlib, numpy as np
from alexlab.data.fast import prepared
from alexlab.data.fast.ram_cache import RamCache
index = prepared.read(pathlib.Path({str(squares)!r}))["train"]
other = RamCache(index, 1_000_000, 2, 1, {mine.where!r})
assert np.array_equal(other.recall(0, 1), index.picture(0).pixels()[0])
assert other.recall(1, 1) is None
other.picture(1).pixels()
"""
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(mine.recall(1, 1), index.picture(1).pixels()[0])  # type: ignore[arg-type]
    assert np.array_equal(mine.recall(0, 1), expected)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data.cache=ram: the ranks of a machine share their memory by /proc, .*null"):
        RamCache(index, 1_000_000, 2, 1, "/proc/0/fd/nothing")


def test_a_table_of_some_forty_bytes_an_image(squares: Path) -> None:
    cache = RamCache(prepared.read(squares)["train"], 10**6)
    assert cache.kept.itemsize * 4 + cache.sizes.itemsize * 2 + cache.kinds.itemsize == PER_IMAGE


def test_memory_at_hand_is_the_systems() -> None:
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < memory_at_hand() <= int(told["MemTotal"].split()[0]) * 1024


def test_memory_of_control_groups(tmp_path: Path) -> None:
    """Version 2's own group and those around it, and version 1's."""
    two, one = tmp_path / "slurm/job/step", tmp_path / "memory/docker"
    for folder, most in ((two, "max"), (two.parent, "5000"), (two.parents[1], "9000")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 500\n")
    one.mkdir(parents=True)
    (one / "memory.limit_in_bytes").write_text("7000\n")
    (one / "memory.usage_in_bytes").write_text("1000\n")
    (one / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200\n")
    told = tmp_path / "told"
    told.write_text("12:cpu,cpuacct:/x\n4:memory:/docker\n0::/slurm/job/step\n")
    assert sorted(_left_in_groups(told, tmp_path)) == [2500, 6200, 6500]
    assert _left_in_groups(tmp_path / "none", tmp_path) == []


def test_a_shard_that_is_cut_short_while_it_is_read_is_told(squares: Path, tmp_path: Path) -> None:
    """To read from its map would be a SIGBUS."""
    for crop_on in ("cpu", "device"):
        folder = tmp_path / crop_on
        folder.mkdir()
        for file in squares.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        data = data_of(folder, crop_on=crop_on, on_error="raise")
        batches(data, 1)
        shard = folder / "train-00001.shard"
        os.truncate(shard, 100)
        with pytest.raises(BrokenImageError, match=f"{shard}:.* cannot be read as an image .its shard is shorter"):
            batches(data, 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"cache": "device"},
            "data.cache=device keeps images that are cropped there, and data.crop_on=auto crops",
        ),
        ({"cache": "device", "crop_on": "cpu"}, "data.crop_on=cpu crops them on the CPU here: add data.crop_on=device"),
        (
            {"crop_on": "device", "policy": "trivial"},
            r"data.crop_on=device, but augment.policy=trivial works on cropped images, on the CPU: augment.policy=none",
        ),
    ],
)
def test_what_the_device_cannot_do_is_told(squares: Path, settings: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        data_of(squares, **settings)  # type: ignore[arg-type]


def test_files_cannot_be_cropped_on_the_device(photos: Path) -> None:
    told = (
        r"data.crop_on=device, but the device crops images of one size that are kept as pixels, and these are others: "
        r"prepare them with python prepare.py data.root=PATH out=PATH format=raw square=true \(the train images of "
    )
    with pytest.raises(UserError, match=told):
        data_of(photos, crop_on="device")


def test_what_does_not_fit_the_device_is_told() -> None:
    check_fits(5 * 10**9, 8 * 10**9)
    with pytest.raises(
        UserError, match=r"data.cache=device: the images are 6.0 GB, and of the device's 8.0 GB at most 70%"
    ):
        check_fits(6 * 10**9, 8 * 10**9)


@pytest.mark.parametrize("words", [["data.cache=ram"], ["data.crop_on=device", "data.cache=device"]])
def test_two_ranks_learn_the_same_with_what_they_keep(squares: Path, tmp_path: Path, words: list[str]) -> None:
    """Each rank of the first epoch meets other images than in the second: they find what the other rank kept."""
    results: list[dict[str, float]] = []
    train: Callable[..., object] = tiny_train
    for name, more in (("plain", [word for word in words if "crop_on" in word]), ("kept", words)):
        done = train(
            squares, tmp_path / name, "data=prepared", "trainer=ddp_cpu", "trainer.max_epochs=2",
            "trainer.limit_train_batches=null", "data.image_size=32", "model=alexnet", "model.name=alexnet",
            "+model.net.hidden=[16,16]", "data.image_size=64", "trainer.accelerator=cpu", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
        results.append(summary_of(tmp_path / name)["last"])
    assert results[0] == results[1]
