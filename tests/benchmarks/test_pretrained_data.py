"""Training, calibration and test data of the study have nothing in common, and are the same every time."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import pytest
import torch

for package in ("skimage", "sklearn", "matplotlib", "PIL"):
    pytest.importorskip(package)

from benchmarks.pretrained import crepe, mtcnn, pictures, sentences, text_model
from benchmarks.pretrained.float_training import FOLDER

SPLITS = get_args(pictures.Split)


def pixels(split: str) -> set[tuple[str, int, int]]:
    """Rows or columns of pictures, by the axis that they are cut along."""
    found = set()
    for name in pictures.pictures_of(split):
        axis, begin, end = pictures.bounds(name, split)
        found |= {(name, axis, position) for position in range(begin, end)}
    return found


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_splits_share_no_part_of_a_picture(one: str, other: str) -> None:
    assert not pixels(one) & pixels(other)


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_splits_share_no_face_and_no_file(one: str, other: str) -> None:
    assert not set(mtcnn._FACES[one]) & set(mtcnn._FACES[other])
    assert not set(text_model._REMAINDERS[one]) & set(text_model._REMAINDERS[other])


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
def test_splits_share_no_sentence(one: str, other: str) -> None:
    if not list(FOLDER.glob("vaderSentiment-*.tar.gz")):
        pytest.skip("the sentences have not been downloaded: make study")
    texts = [{sentence.text for sentence in sentences.sentences(split)} for split in (one, other)]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("split", SPLITS)
def test_crops_come_from_their_split(split: str) -> None:
    """A crop at its own size is found, as it is or mirrored, in one of the split's regions."""
    size = 64
    for crop in pictures.crops(split, 4, size, torch.Generator().manual_seed(0), smallest=10_000)[:, :, 0, 0]:
        assert crop.min() >= 0
        assert crop.max() <= 255
    regions = [pictures.region(name, split).float() for name in pictures.pictures_of(split)]
    assert all(min(region.shape[1:]) >= size for region in regions)


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
