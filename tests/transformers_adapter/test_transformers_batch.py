"""Batches split over ranks, and the loss over the parts."""

import pytest
import torch
from models import build, draw_ids, packed_batch, run
from torch.nn.functional import cross_entropy

import ringcore
import ringcore_transformers
from ringcore import KeywordError, LayoutError, ShapeError, UnsupportedError
from ringcore_transformers import loss, split_batch, sum_gradients

LAYOUTS = ["contiguous", "zigzag", "striped"]


def split_all(batch, layout, size, **keywords):
    return [split_batch(batch, layout, rank, size, **keywords) for rank in range(size)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_parts_make_up_the_batch(layout, size):
    ids = draw_ids()
    batch = {"input_ids": ids, "attention_mask": ids % 2, "inputs_embeds": torch.randn(2, 13, 3)}
    parts = split_all(batch, layout, size)
    for name, whole in {**batch, "position_ids": torch.arange(13).expand(2, 13)}.items():
        assert torch.equal(ringcore.unshard([part[name] for part in parts], layout, axis=1), whole)
    assert all(part.keys() == {*batch, "position_ids"} for part in parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_token_is_to_predict_the_next_one_wherever_that_is(layout, size):
    ids = draw_ids()
    for part in split_all({"input_ids": ids, "labels": ids}, layout, size):
        assert "labels" not in part
        for entry in range(2):
            for position, label in zip(part["position_ids"][entry], part["shift_labels"][entry], strict=True):
                assert label == (ids[entry, position + 1] if position < 12 else -100)


def test_labels_that_are_in_place_stay_there():
    ids = draw_ids()
    assert torch.equal(
        split_batch({"input_ids": ids, "shift_labels": ids}, "contiguous", 1, 2)["shift_labels"], ids[:, 7:]
    )
    assert torch.equal(
        split_batch({"input_ids": ids, "labels": ids}, "contiguous", 1, 2, causal=False)["labels"], ids[:, 7:]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_the_ends_of_packed_documents(layout):
    batch, ends = packed_batch()
    parts = split_all({"input_ids": batch["input_ids"], **ends}, layout, 3)
    assert torch.equal(
        ringcore.unshard([part["position_ids"] for part in parts], layout, axis=1), batch["position_ids"]
    )
    assert all(part[name] is x for part in parts for name, x in ends.items())
    assert split_all({**batch, **ends}, layout, 3)[1].keys() == parts[1].keys()


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        ({}, KeywordError, "holds nothing"),
        ({"input_ids": draw_ids(1), "max_length_q": 8}, KeywordError, "no cu_seq_lens_q and no cu_seq_lens_k"),
        ({**packed_batch()[0]}, UnsupportedError, "cu_seq_lens_q and cu_seq_lens_k"),
        (
            {"input_ids": draw_ids(1, 12), **packed_batch()[1]},
            KeywordError,
            "cu_seq_lens_q ends at 13, but the batch has 12",
        ),
        ({"input_ids": draw_ids(), "pixels": draw_ids()}, KeywordError, "holds pixels"),
        ({"input_ids": draw_ids(), "labels": draw_ids(length=12)}, ShapeError, r"labels has shape \(2, 12\)"),
        ({"input_ids": draw_ids()[0]}, ShapeError, r"input_ids has shape \(13,\)"),
        ({"input_ids": draw_ids(length=1)}, LayoutError, "leaves rank 1 none of 1 tokens"),
        ({"input_ids": draw_ids(), "position_ids": torch.arange(13)[None] - 2}, UnsupportedError, "padding on the left"),
        ({"labels": draw_ids(), "shift_labels": draw_ids()}, KeywordError, "labels and shift_labels"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(batch, error, said):
    with pytest.raises(error, match=said):
        split_batch(batch, "contiguous", 0, 2)


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(LayoutError, match="rank is 2"):
        split_batch({"input_ids": draw_ids()}, "zigzag", 2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_of_one_process_is_the_mean_over_its_tokens(dtype):
    ids = draw_ids()
    logits = torch.randn(2, 13, 61, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    labels = split_batch({"labels": ids}, "contiguous", 0, 1)["shift_labels"]
    labels[0, :4] = -100
    came = loss(logits, labels)
    kept = [(logits[b, s].double(), ids[b, s + 1]) for b in range(2) for s in range(12) if b or s >= 4]
    due = sum(x.logsumexp(0) - x[label] for x, label in kept) / len(kept)
    assert came.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(came.double(), due, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


def test_the_loss_refuses_what_does_not_fit():
    logits, labels = torch.randn(2, 13, 61), draw_ids()
    with pytest.raises(ShapeError, match=r"\(2, 12\)"):
        loss(logits, labels[:, 1:])
    with pytest.raises(KeywordError, match="ring is 2"):
        loss(logits, labels, 2)
    with pytest.raises(KeywordError, match="ring is 2"):
        sum_gradients([], 2)


def test_nothing_to_predict_gives_nan_as_in_torch():
    logits, labels = torch.randn(1, 3, 61), torch.full((1, 3), -100)
    assert loss(logits, labels).isnan()
    assert cross_entropy(logits[0], labels[0]).isnan()


def test_a_layout_of_your_own():
    layout = ringcore.Layout(((range(9, 13), range(0, 2)), (range(2, 9),)))
    ids = draw_ids()
    parts = split_all({"input_ids": ids, "labels": ids}, layout, 2)
    assert parts[0]["position_ids"][1].tolist() == [9, 10, 11, 12, 0, 1]
    assert torch.equal(parts[0]["shift_labels"][:, [0, 1, 2, 4, 5]], ids[:, [10, 11, 12, 1, 2]])
    ringcore_transformers.register("ring_in_process", ring_size=2, layout=layout)
    came, due = (run(build("llama"), attention, input_ids=ids)[0] for attention in ("ring_in_process", "sdpa"))
    torch.testing.assert_close(came, due)
