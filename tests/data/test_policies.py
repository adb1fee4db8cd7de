"""TrivialAugment and RandAugment, operation by operation against torchvision's on the same PIL image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from torchvision.transforms import v2

from alexlab.data import policies
from alexlab.data.sample_rng import SampleRng

TORCHVISION_NAMES = (
    "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness Posterize Solarize "
    "AutoContrast Equalize"
)
THEIRS = dict(zip(policies.NAMES, TORCHVISION_NAMES.split(), strict=True))


def image(tmp_path: Path) -> Image.Image:
    with Image.open(photo(tmp_path / "x.png", (93, 77))) as opened:
        return opened.convert("RGB")


@pytest.mark.parametrize(("policy", "theirs"), [("trivial", v2.TrivialAugmentWide()), ("rand", v2.RandAugment())])
@pytest.mark.parametrize("name", policies.NAMES)
def test_operations_and_strengths_equal_torchvisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, theirs: v2.TrivialAugmentWide, name: str
) -> None:
    source = image(tmp_path)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[THEIRS[name]]
    assert signed == (name in policies.SIGNED)
    amounts = magnitudes(31, *source.size[::-1])
    for strength in range(0, 31, 3):
        for negative in (0, 1) if signed else (0,):
            answers = iter([policies.NAMES.index(name), *([strength] if policy == "trivial" else []), negative])
            rng = SampleRng()
            monkeypatch.setattr(SampleRng, "below", lambda self, count, answers=answers: next(answers))
            ours = policies.draw(policy, strength, source.size, rng)
            amount = 0.0 if amounts is None else float(amounts[strength]) * (-1 if negative else 1)
            scale = 255 if name == "solarize" else 1
            assert ours == (name, pytest.approx(scale * amount, abs=1e-4)), "torchvision computes in float32"
            nearest, fill = v2.InterpolationMode.NEAREST, {Image.Image: None}
            expected = theirs._apply_image_or_video_transform(source, THEIRS[name], ours[1] / scale, nearest, fill)
            changed = (np.asarray(policies.OPERATIONS[ours[0]](source, ours[1])) != np.asarray(expected)).any(2).mean()
            assert changed < 0.001, "their shears are converted to degrees and back, which changes the last bit"


def test_operations_are_equally_likely_and_torchs_generator_is_not_used(tmp_path: Path) -> None:
    for theirs in (v2.TrivialAugmentWide, v2.RandAugment):
        assert set(theirs._AUGMENTATION_SPACE) == set(THEIRS.values())
    state = torch.get_rng_state()
    names = [policies.draw("trivial", 0, (1, 1), SampleRng(0, i))[0] for i in range(14 * 300)]
    assert {name: abs(names.count(name) - 300) < 4.5 * 300**0.5 for name in policies.NAMES} == dict.fromkeys(
        THEIRS, True
    )
    pixels = np.asarray(image(tmp_path))
    once, again, other = (policies.apply(pixels, "rand", 3, 15, SampleRng(i)) for i in (5, 5, 6))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert torch.equal(state, torch.get_rng_state())
