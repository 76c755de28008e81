"""Labelled sentences: tweets, reviews of products and films, editorials, rated by twenty people each.

They belong to VADER (Hutto and Gilbert 2014) and are part of the source distribution of the package
``vaderSentiment``, not of its wheel.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
from functools import cache
from typing import NamedTuple

from .float_training import FOLDER
from .pictures import Split

VERSION = "3.3.2"
TEST, CALIBRATION = 800, 200
_SOURCES = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
_WEAKEST = 0.5  # of ratings from -4 to 4; what is nearer to 0 is neither positive nor negative


class Sentence(NamedTuple):
    """A sentence and whether those who rated it found it positive."""

    text: str
    positive: bool


@cache
def sentences(split: Split) -> list[Sentence]:
    """The sentences of a split, in an order that a fixed seed has shuffled; no text is in two splits."""
    unique = {}
    for source in _SOURCES:
        for line in _ground_truth(source).splitlines():
            _, rating, text = line.split("\t", 2)
            if abs(float(rating)) >= _WEAKEST:
                unique.setdefault(text.strip(), float(rating) > 0)
    every = [Sentence(text, positive) for text, positive in unique.items()]
    random.Random(0).shuffle(every)
    test, calibration, train = every[:TEST], every[TEST : TEST + CALIBRATION], every[TEST + CALIBRATION :]
    return {"test": test, "calibration": calibration, "train": train}[split]


def _ground_truth(source: str) -> str:
    distribution = FOLDER / f"vaderSentiment-{VERSION}.tar.gz"
    if not distribution.exists():
        FOLDER.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary=:all:", f"--dest={FOLDER}", f"vaderSentiment=={VERSION}"]
        subprocess.run(command, check=True)
    inner = _member(distribution.read_bytes(), "hutto_ICWSM_2014.tar.gz")
    return _member(inner, f"{source}_GroundTruth.txt").decode("latin-1")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(f"/{name}"):
                file = files.extractfile(member)
                assert file is not None
                return file.read()
    raise FileNotFoundError(f"{name} is not in the archive")
