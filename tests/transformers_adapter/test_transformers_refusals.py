"""What a model needs and ring attention lacks is refused by name when the model runs."""

import pytest
import torch
from models import build, draw_ids, run
from transformers import AttentionInterface
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import ringcore
import ringcore_transformers
from ringcore import KeywordError, LayoutError, ShapeError, UnsupportedError
from ringcore_transformers.model_mask import ModelMask, read_mask

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def ring():
    return ringcore_transformers.register("ring_in_process", ring_size=3)


def refuses(error, said, model, **batch):
    with pytest.raises(error, match=said) as caught:
        run(model, "ring_in_process", **{"input_ids": draw_ids(), **batch})
    assert isinstance(caught.value, ringcore.RingcoreError)


def test_attention_dropout_in_training(ring):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    refuses(UnsupportedError, r"dropout of 0\.1.*model\.eval\(\)", model)
    model.eval()
    run(model, "ring_in_process", input_ids=draw_ids())


def test_queries_scaled_by_their_places_are_refused_on_a_ring_of_processes():
    model = build("llama4")
    for layer in model.model.layers:
        layer.self_attn.attn_temperature_tuning = True
    ringcore_transformers.register("ring_of_one", ring=OfOne())
    with pytest.raises(UnsupportedError, match="scales queries by their places on this rank"):
        run(model, "ring_of_one", input_ids=draw_ids())
    ringcore_transformers.register("ring_in_process", ring_size=3)
    run(model, "ring_in_process", input_ids=draw_ids())  # where all places are those of the whole sequence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("head_mask", torch.ones(4)),
        ("cu_seqlens", torch.tensor([0, 13])),
        ("seq_idx", 1),
    ],
)
def test_keywords_that_ask_for_what_is_lacking(ring, name, value):
    refuses(UnsupportedError, f"called with {name}, which asks for", build("llama"), **{name: value})


def test_an_unknown_keyword(ring):
    refuses(UnsupportedError, "called with twist, which asks for something unknown here", build("llama"), twist=3)


def test_keywords_that_ask_for_nothing_are_taken(ring):
    model = build("llama")
    due = run(model, "ring_in_process", input_ids=draw_ids())[0]
    nothing = {"output_attentions": False, "cu_seq_lens_q": None, "output_hidden_states": True, "use_cache": True}
    came = run(model, "ring_in_process", input_ids=draw_ids(), num_items_in_batch=3, **nothing)[0]
    assert torch.equal(came, due)


def test_a_cache_with_a_past(ring):
    model = build("llama").eval()
    model.set_attn_implementation("ring_in_process")
    past = model(input_ids=draw_ids(), use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="KV cache with a past"):
        model(input_ids=draw_ids(length=2), past_key_values=past)
    with pytest.raises(UnsupportedError, match=r"generate with past_key_values=ringcore_transformers\.RingCache"):
        model.generate(draw_ids(), max_new_tokens=3, do_sample=False)


def test_a_mask_that_begins_after_a_past(ring):
    x = torch.ones(2, 4, 2, 8)
    for offsets in ({"q_offset": torch.tensor(3)}, {"kv_offset": 3}, {"kv_length": 4}):
        mask = ring.mask(**{"kv_length": 2, "mask_function": causal_mask_function, **offsets})
        with pytest.raises(
            UnsupportedError, match=r"2 queries from . on, 2 keys .* a mask of . keys from . on: a KV cache"
        ):
            ring(torch.nn.Identity(), x, x, x, mask)


def test_a_ready_made_mask(ring):
    mask = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    refuses(
        UnsupportedError, r"ready-made attention_mask of shape \(2, 1, 13, 13\)", build("llama"), attention_mask=mask
    )


def test_a_model_that_looks_into_its_mask():
    with pytest.raises(UnsupportedError, match="reads 'dtype' of its attention mask"):
        ModelMask(causal=True).dtype  # noqa: B018
    assert not hasattr(ModelMask(causal=True), "shape")


def test_packed_documents(ring):
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    refuses(UnsupportedError, "position_ids.0, 6. is 0.*packed documents", build("llama"), position_ids=positions)
    ends = torch.tensor([0, 6, 13])
    wrong = {"position_ids": positions, "cu_seq_lens_q": ends}
    refuses(UnsupportedError, "the same for queries and keys", build("llama"), **wrong)
    for others, error, said in (
        ([0, 5, 13], KeywordError, r"position_ids\[0, 5\] is 5 .*that token position 0 of its document"),
        ([0, 6, 12], KeywordError, "cu_seq_lens_q ends at 12, but there are 13 tokens"),
        ([0, 6, 6, 13], KeywordError, "document 1 is empty"),
    ):
        given = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor(others))
        refuses(error, said, build("llama"), position_ids=positions, **given)
    x = torch.ones(2, 4, 13, 8)
    with pytest.raises(UnsupportedError, match="does not show its position ids"):
        ring(torch.nn.Identity(), x, x, x, ModelMask(causal=True), cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    # A model may look at the position ids for its mask alone: nobody can tell a layout's from documents' then.
    mask = ModelMask(causal=True, packed=True)
    x = torch.ones(2, 4, 13, 8)
    with pytest.raises(UnsupportedError, match="does not show them"):
        ring(torch.nn.Identity(), x, x, x, mask)


def test_position_ids_of_no_layout(ring):
    refuses(
        KeywordError,
        r"position_ids\[0, 0\] is 4 on rank 0 of 1",
        build("llama"),
        position_ids=torch.arange(4, 17)[None],
    )
    x = torch.ones(2, 4, 13, 8)
    with pytest.raises(ShapeError, match=r"\(3, 2, 13\)"):
        ring(torch.nn.Identity(), x, x, x, None, position_ids=torch.arange(13).expand(3, 2, 13))


@pytest.mark.parametrize("mask", [[0] * 3 + [1] * 10, [1] * 4 + [0] + [1] * 8])
def test_padding_that_is_not_on_the_right(ring, mask):
    mask = torch.tensor([mask, [1] * 13])
    refuses(UnsupportedError, "batch entry 0.*padding on the right alone", build("bert"), attention_mask=mask)


def test_padding_of_another_length(ring):
    refuses(
        ShapeError,
        r"attention_mask has shape \(2, 26\), but this rank has 13",
        build("bert"),
        attention_mask=torch.ones(2, 26),
    )


def test_a_keyword_that_contradicts_the_mask(ring):
    x = torch.ones(2, 4, 13, 8)
    with pytest.raises(KeywordError, match="is causal, but its attention says is_causal=False"):
        ring(torch.nn.Identity(), x, x, x, ModelMask(causal=True), is_causal=False)
    model = build("mistral with a window")
    model.model.layers[1].self_attn.config = model.config.__class__(**{**model.config.to_dict(), "sliding_window": 7})
    model.model.layers[1].self_attn.config._attn_implementation = "ring_in_process"
    refuses(KeywordError, r"sliding_window=7.*mask has the window \(3, None\)", model)


def test_layers_that_mix_positions_otherwise_are_refused_on_a_ring_of_processes():
    x = torch.ones(1, 2, 4, 8)
    module = torch.nn.Identity()
    module.config = type("Config", (), {"layer_types": ["linear_attention", "full_attention"]})
    attention = ringcore_transformers.register("ring_of_one", ring=OfOne())
    with pytest.raises(UnsupportedError, match="layers of kind linear_attention"):
        attention(module, x, x, x, ModelMask(causal=True))


def test_parts_whose_sequence_is_not_split_are_refused_on_a_ring_of_processes():
    x = torch.ones(1, 2, 4, 8)
    attention = ringcore_transformers.register("ring_of_one", ring=OfOne())
    with pytest.raises(UnsupportedError, match="Identity asks for attention without the mask"):
        attention(torch.nn.Identity(), x, x, x, None)
    ringcore_transformers.register("ring_in_process", ring_size=2)(torch.nn.Identity(), x, x, x, None)


class OfOne:
    """A transport with nobody else on it."""

    rank = node = 0
    size = sharers = 1

    def check(self, *arrays):
        pass

    def gather(self, note):
        return (note,)

    def exchange(self, kind, sends, receives):
        raise AssertionError("there is nobody to send to")

    def abort(self, error):
        raise error


def test_a_layout_that_does_not_fit():
    ringcore_transformers.register("ring_in_process", ring_size=3, layout="spiral")
    refuses(LayoutError, "spiral", build("llama"))


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "my flash", "paged|sdpa", "a/b"])
def test_names_that_mean_something_else(name):
    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(KeywordError, match="name is"):
        ringcore_transformers.register(name)
    assert AttentionInterface._global_mapping == before


MADE = {
    "causal": (causal_mask_function, ModelMask(True)),
    "window": (sliding_window_causal_mask_function(3), ModelMask(True, (2, None))),
    "both ways": (sliding_window_bidirectional_mask_function(3), ModelMask(False, (3, 3))),
    "two windows": (
        and_masks(sliding_window_overlay(5), sliding_window_causal_mask_function(2)),
        ModelMask(True, (1, None)),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_mask_is_read_as_its_function_says(name):
    function, due = MADE[name]
    mask = read_mask(function)
    assert mask == due
    i, j = torch.arange(9)[:, None], torch.arange(9)
    left, right = (9 if side is None else side for side in mask.window)
    seen = (j - i >= -left) & (j - i <= (0 if mask.causal else right))
    assert torch.equal(function(0, 0, i, j).expand(9, 9), seen)


def test_chunks_are_read_as_such():
    assert read_mask(chunked_causal_mask_function(3, torch.zeros(1))) == ModelMask(True, chunk=3)
    both = and_masks(sliding_window_overlay(2), chunked_causal_mask_function(3, torch.zeros(1)))
    assert read_mask(both) == ModelMask(True, (1, None), chunk=3)


def test_the_borders_of_documents_are_read_as_such():
    packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1]]))
    assert read_mask(and_masks(causal_mask_function, packed)) == ModelMask(True, packed=True)


@pytest.mark.parametrize(
    "function",
    [
        or_masks(causal_mask_function, sliding_window_overlay(2)),
        and_masks(causal_mask_function, lambda b, h, i, j: i > j),
        and_masks(causal_mask_function, padding_mask_function(torch.ones(1, 9))),
        torch.ones,
    ],
)
def test_a_mask_made_in_another_way_is_refused(function):
    with pytest.raises(UnsupportedError, match="the model's mask is made by"):
        read_mask(function)
