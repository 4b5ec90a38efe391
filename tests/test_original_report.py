"""The report that started this: ring attention that summed each chunk's softmax, so its outputs grew with the ring.

Its numbers came from `torch.manual_seed(42)` on a CUDA device; `philox` draws the same inputs without one.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from philox import philox, standard_normal

import ringcore

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import original_report
from original_report import SHAPE, as_reported, dense

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def qkv() -> list[NDArray[np.float32]]:
    return [standard_normal(42, SHAPE, call) for call in range(3)]


@pytest.mark.parametrize(
    ("word", "seed", "expected"),
    [
        (0x00000000, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(word, seed, expected):
    assert philox(np.full((4, 1), word, np.uint64), seed)[:, 0].tolist() == expected


def test_the_draws_are_those_of_torch_on_cuda():
    np.testing.assert_allclose(standard_normal(0, (4,)), [-0.9247, -0.4253, -2.6438, 0.1452], rtol=0, atol=5e-5)


def test_more_draws_than_the_layout_is_known_for_are_refused():
    with pytest.raises(ValueError, match="32769 elements"):
        standard_normal(0, (2**15 + 1,))


def test_dense_attention_sums_to_what_was_reported(qkv):
    assert dense(*qkv).sum() == pytest.approx(88.0908, abs=1e-4)


@pytest.mark.parametrize(
    ("ring_size", "total", "digits", "difference", "difference_digits"),
    [(2, 178.6833, 4, 0.3878, 4), (4, 376.84, 2, 1.07, 2)],
)
def test_summing_each_chunks_softmax_gives_the_reported_error(
    qkv, ring_size, total, digits, difference, difference_digits
):
    wrong = as_reported(*qkv, ring_size)
    assert round(float(wrong.sum()), digits) == total
    assert round(float(abs(wrong - dense(*qkv)).max()), difference_digits) == difference


@pytest.mark.parametrize("ring_size", [1, 2, 4, 8])
def test_the_ring_gives_dense_attention_at_every_ring_size(qkv, ring_size):
    out = ringcore.ring_attention(*qkv, ring_size=ring_size, axes="bshd")
    assert out.shape == SHAPE
    assert out.dtype == np.float32
    assert abs(out - dense(*qkv)).max() < 1e-6
    # 32,768 float32 numbers: their own rounding moves the sum by far less than the last digit.
    assert out.sum(dtype=np.float64) == pytest.approx(88.0908, abs=1e-4)


def test_the_page_about_the_report_says_what_its_program_prints(capsys):
    """All figures; memory may differ by a little."""
    original_report.main()
    printed = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs" / "explanation" / "original-report.md").read_text()
    shown = page.partition("```text\n")[2].partition("```")[0].splitlines()
    memory = next(number for number, line in enumerate(printed) if line.startswith("peak memory"))
    assert printed[: memory + 1] == shown[: memory + 1]
    assert len(printed) == len(shown) == memory + 5
    for ours, theirs in zip(printed[memory + 1 :], shown[memory + 1 :], strict=True):
        numbers = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in (ours, theirs)]
        np.testing.assert_allclose(*numbers, atol=0.3)
        assert numbers[0][0] == pytest.approx(numbers[0][-1], abs=0.3)  # it is a + b / R
