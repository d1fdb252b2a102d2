"""The stream of samples: a function of seed and position, whatever the batch, the accumulation and the number of processes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdclr.data.batches import Batches, Sample


def stream(batches: Batches, steps: int) -> list[Sample]:
    """All samples of some steps, in the order they are seen."""
    return [sample for step in range(steps) for micro in batches(step) for sample in micro]


@pytest.mark.parametrize(("images", "size"), [(16, 4), (7, 3), (5, 5), (3, 4), (1, 2)])
def test_every_epoch_is_a_permutation_even_when_steps_straddle_epochs(images: int, size: int) -> None:
    seen = [s.index for s in stream(Batches(1, images, 1, size), 6 * images)]
    epochs = [seen[at : at + images] for at in range(0, len(seen), images)]
    assert len(epochs) >= 6
    assert all(sorted(epoch) == list(range(images)) for epoch in epochs)


def test_epochs_are_ordered_differently_and_so_are_seeds() -> None:
    order = [s.index for s in stream(Batches(1, 50, 1, 50), 2)]
    assert order[:50] != order[50:]
    assert order != [s.index for s in stream(Batches(2, 50, 1, 50), 2)]


@pytest.mark.parametrize(("size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_micro_batches_add_up_to_the_same_samples(size: int, accumulate: int) -> None:
    batches = Batches(3, 10, 4, size, accumulate, caption_dropout=0.3)
    assert [(len(batches(5)), len(micro)) for micro in batches(5)] == [(accumulate, size)] * accumulate
    assert stream(batches, 20) == stream(Batches(3, 10, 4, 4, 1, caption_dropout=0.3), 20)


@given(size=st.integers(1, 5), accumulate=st.integers(1, 4), processes=st.integers(1, 4), step=st.integers(0, 50))
def test_ranks_share_out_each_micro_batch_of_the_one_stream(
    size: int, accumulate: int, processes: int, step: int
) -> None:
    whole = size * processes
    ranks = [Batches(3, 11, 2, whole, accumulate, 0.5, rank, processes)(step) for rank in range(processes)]
    together = [sample for micro in range(accumulate) for rank in ranks for sample in rank[micro]]
    assert together == Batches(3, 11, 2, whole * accumulate, 1, 0.5)(step)[0]
    assert all(len(micro) == size for rank in ranks for micro in rank)


def test_a_step_asked_for_alone_is_the_step_that_comes_in_turn() -> None:
    batches = Batches(9, 7, 3, 2, 2, 0.2)
    in_turn = [batches(step) for step in range(30)]
    assert [batches(step) for step in reversed(range(30))] == in_turn[::-1]


def test_positions_count_every_sample_once() -> None:
    assert [s.position for s in stream(Batches(1, 5, 1, 3, 2), 4)] == list(range(24))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_emptied_captions_is_the_one_asked_for(share: float) -> None:
    dropped = [s.drop_caption for s in stream(Batches(4, 20, 1, 100, caption_dropout=share), 40)]
    if share in (0.0, 1.0):
        assert set(dropped) == {share == 1.0}
    # Four standard deviations of 4,000 draws.
    assert sum(dropped) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5 + 1e-12)


def test_a_larger_share_empties_the_same_captions_and_more() -> None:
    few, many = (
        {s.position for s in stream(Batches(4, 20, 1, 100, caption_dropout=share), 5) if s.drop_caption}
        for share in (0.1, 0.3)
    )
    assert few < many


def test_every_view_is_drawn_about_equally_often() -> None:
    counts = Counter(s.view for s in stream(Batches(4, 20, 4, 100), 40))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(n - 1000) < 120 for n in counts.values())


@pytest.mark.parametrize(
    ("size", "accumulate", "processes", "steps"), [(4, 1, 1, 4.0), (4, 2, 1, 2.0), (4, 2, 2, 2.0), (5, 1, 1, 3.2)]
)
def test_steps_per_epoch_may_be_fractional(size: int, accumulate: int, processes: int, steps: float) -> None:
    assert Batches(1, 16, 1, size, accumulate, processes=processes).steps_per_epoch == steps
