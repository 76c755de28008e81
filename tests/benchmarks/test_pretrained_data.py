"""Training, calibration and test data of the study have nothing in common, and are the same every time."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations
from typing import get_args

import pytest
import torch

from benchmarks.pretrained import crepe, mtcnn, pictures, sentences, text_model
from benchmarks.pretrained.float_training import FOLDER

SPLITS = get_args(pictures.Split)
PAIRS = list(combinations(SPLITS, 2))

needs_pictures = pytest.mark.skipif(find_spec("skimage") is None, reason="scikit-image is not installed")


def pixels(split: str) -> set[tuple[str, int, int]]:
    """Rows or columns of pictures, by the axis that they are cut along."""
    found = set()
    for name in pictures.pictures_of(split):
        axis, begin, end = pictures.bounds(name, split)
        found |= {(name, axis, position) for position in range(begin, end)}
    return found


@needs_pictures
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_part_of_a_picture(one: str, other: str) -> None:
    assert not pixels(one) & pixels(other)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_face_and_no_file(one: str, other: str) -> None:
    assert not set(mtcnn._FACES[one]) & set(mtcnn._FACES[other])
    assert not set(text_model._REMAINDERS[one]) & set(text_model._REMAINDERS[other])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_sentence(one: str, other: str) -> None:
    if not list(FOLDER.glob("vaderSentiment-*.tar.gz")):
        pytest.skip("the sentences have not been downloaded: make study")
    texts = [{sentence.text for sentence in sentences.sentences(split)} for split in (one, other)]
    assert not texts[0] & texts[1]


@needs_pictures
@pytest.mark.parametrize("split", SPLITS)
def test_a_region_is_its_part_of_the_picture(split: str) -> None:
    for name in pictures.pictures_of(split):
        axis, begin, end = pictures.bounds(name, split)
        whole, region = pictures.photograph(name), pictures.region(name, split)
        assert region.shape[axis] == end - begin
        assert torch.equal(region, whole.index_select(axis, torch.arange(begin, end)))


@needs_pictures
@pytest.mark.parametrize("split", SPLITS)
def test_crops_hold_what_their_region_holds(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of regions of one colour each, crops have no other colour, and every region is as frequent as another."""
    names = pictures.pictures_of(split)
    colours = {name: 10 * (index + 1) for index, name in enumerate(names)}

    def region(name: str, split: str) -> torch.Tensor:
        return torch.full((3, 90, 70), colours[name], dtype=torch.uint8)

    monkeypatch.setattr(pictures, "region", region)
    crops = pictures.crops(split, 2 * len(names), 32, torch.Generator().manual_seed(0), smallest=48)
    assert crops.shape == (2 * len(names), 3, 32, 32)
    means = crops.mean((1, 2, 3)).round().int().tolist()
    assert torch.allclose(crops, crops.mean((1, 2, 3), keepdim=True).expand_as(crops), atol=1e-3)
    assert sorted(means) == sorted(2 * list(colours.values()))


@needs_pictures
def test_the_same_seed_draws_the_same() -> None:
    draws = [pictures.crops("train", 3, 32, torch.Generator().manual_seed(5), smallest=64) for _ in range(2)]
    assert torch.equal(*draws)
    draws = [crepe.notes(3, torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*draws)


def test_notes_have_the_pitch_that_they_claim() -> None:
    """The period of a note, found by autocorrelation, is that of its label or of a harmonic below it."""
    frames, cents = crepe.notes(64, torch.Generator().manual_seed(1))
    assert torch.allclose(frames.mean(1), torch.zeros(64), atol=1e-5)
    assert torch.allclose(frames.std(1), torch.ones(64), atol=1e-5)
    frequency = 10 * 2 ** (cents / 1200)
    for frame, hertz in zip(frames, frequency, strict=True):
        if hertz > 300:  # several periods in a frame, and lags long enough to be told apart
            lag = crepe.SAMPLE_RATE / hertz.item()
            spectrum = torch.fft.rfft(frame.double(), 4096).abs().square()
            correlation = torch.fft.irfft(spectrum)[: 4 * int(lag)]
            at_period = correlation[round(lag) - 1 : round(lag) + 2].max()
            assert at_period > 0.5 * correlation[0]
