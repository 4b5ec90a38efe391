"""Generating over a RingCache, in one process and with its positions on two, against transformers alone."""

import pytest
import torch
from generating import CASES, NEW, due, generate, poison, prepare
from ranks import on_ranks

import ringcore_transformers
from ringcore_transformers import RingCache
from ringcore_transformers.cache_layer import GROWTH

pytestmark = pytest.mark.timeout(200)

HYBRIDS = "qwen2 with a window", "gemma2", "gpt_oss"  # whose second layer has a window, the first none


@pytest.mark.parametrize("size", [None, 3])
def test_in_one_process_the_tokens_are_those_of_transformers_alone(size, monkeypatch):
    ringcore_transformers.register("ring_in_process", ring_size=size)
    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    for case in CASES:
        model, keywords = prepare(*case)
        came = generate(model, "ring_in_process", **keywords, past_key_values=RingCache())
        assert torch.equal(came, due(*case)), case


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found for every case."""
    return on_ranks("generation", tmp_path_factory.mktemp("generation"))


def test_on_two_ranks_the_tokens_are_those_of_one_process(ranks):
    for case in CASES:
        expected = due(*case)
        for found in ranks:
            assert torch.equal(found[case][0], expected), case


def test_each_rank_holds_its_part_of_the_positions(ranks):
    for found in ranks:
        for (name, prompt, way), (_, length, (first, second)) in found.items():
            assert length >= NEW - 1
            if name != "mistral with a window":
                assert length / 2 <= first <= GROWTH * (length + 1) / 2, (name, way, first)
            elif prompt != "padded":  # what a window of 4 and a new token need, and what is dropped together with more
                assert first <= 4 < length / 2, (prompt, first)
            assert (second < first) == (name in HYBRIDS), (name, first, second)


def test_both_ranks_have_the_same_logits_and_go_on_from_a_cache(tmp_path):
    (logits, more, again), (other_logits, _, other) = on_ranks("generation_scores", tmp_path)
    assert torch.equal(logits, other_logits)
    assert torch.equal(again, other)
    model, keywords = prepare("llama", "padded", "sampled")
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    torch.testing.assert_close(logits, torch.stack(generate(model, "sdpa", **keywords, **wanted).logits))
    mask = torch.nn.functional.pad(keywords["attention_mask"], (0, more.shape[1] - 9), value=1)
    assert torch.equal(again, generate(model, "sdpa", **{**keywords, "input_ids": more, "attention_mask": mask}))


REFUSED = {  # the error on each rank, and what both say
    "other prompts": ("AgreementError", "AgreementError", "batch entry 0 has other tokens on rank 1 than on rank 0"),
    "other last tokens": ("AgreementError", "AgreementError", "has other tokens on rank 1"),
    "other seeds": ("AgreementError", "AgreementError", "torch.manual_seed with the same seed on every rank"),
    "a longer prompt": ("AgreementError", "AgreementError", "rank 0 has new tokens: 9, but rank 1: 8"),
    "other padding": ("AgreementError", "AgreementError", "rank 0 has padding on the left: [0, 5, 0, 8], but rank 1"),
    "padding on the right on one rank": ("PeerError", "UnsupportedError", "padding is on the left alone"),
    "a used cache on one rank": ("AgreementError", "AgreementError", "rank 0 has new tokens: 9, but rank 1"),
    "a keyword on one rank": ("PeerError", "UnsupportedError", "output_attentions"),
    "no cache": ("PeerError", "KeywordError", "past_key_values=ringcore_transformers.RingCache()"),
}


def test_what_is_wrong_on_one_rank_is_refused_on_both_and_the_ring_lives_on(tmp_path):
    ranks = on_ranks("generation_refusals", tmp_path)
    for name, (*errors, said) in REFUSED.items():
        for found, error in zip(ranks, errors, strict=True):
            kind, message, length = found[name]
            assert kind == error, (name, kind, message)
            assert said in message
            assert (length > 0) == (name == "other seeds"), name  # where the first token was drawn already
    for found in ranks:
        assert torch.equal(found["again"], due("llama", "padded", "greedy"))
    for found, error in zip(ranks, ("PeerError", "MemoryError"), strict=True):
        kind, message = found["no memory on one rank"]
        assert kind == error
        assert "nothing left" in message
