"""A RingCache by itself: where positions lie, room that grows, copies, and what is refused by name."""

import copy

import pytest
import torch
import transformers
from generating import generate, poison, prepare
from models import build, draw_ids
from test_transformers_refusals import OfOne

import ringcore
import ringcore_transformers
from ringcore import AgreementError, KeywordError, RingcoreError, ShapeError, UnsupportedError
from ringcore_transformers import RingCache, cache_layer
from ringcore_transformers.cache_layer import NewKeys, RingCacheLayer
from ringcore_transformers.model_mask import ModelMask

pytestmark = pytest.mark.timeout(120)

PADDING = (0, 2, 2, 5)


def new_keys(layer, first, rows, entries=4):
    """Keys and values that say where they are: entry and column."""
    columns = torch.arange(first, first + rows, dtype=torch.float64)
    keys = torch.stack([100.0 * entry + columns for entry in range(entries)])[:, None, :, None]
    return NewKeys(layer, keys.expand(entries, 2, rows, 3), -keys.expand(entries, 2, rows, 1))


def write(layer, rows, rank, size, padding=PADDING, reach=None):
    new = new_keys(layer, layer.length, rows, len(padding))
    held = layer.write(new, padding, rank, size, reach)
    layer.keep(new)
    return held


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_position_lies_on_one_rank_and_what_was_not_written_is_not_read(size, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    layers = [RingCacheLayer() for _ in range(size)]
    for rows in (3, 1, 1, 4, 1):  # the last entry is padding alone at first
        padding = tuple(min(columns, layers[0].length + rows) for columns in PADDING)
        parts = [write(layer, rows, rank, size, padding) for rank, layer in enumerate(layers)]
        length = layers[0].length
        for entry, columns in enumerate(padding):
            keys = ringcore.unshard([part.keys for part in parts], "striped")[entry, 0, :, 0]
            assert parts[0].key_lengths[entry] == length - columns
            assert keys[: length - columns].tolist() == [100.0 * entry + j for j in range(columns, length)]
            assert parts[0].query_offset[entry] == length - rows - columns
        assert all(part.values.shape[3] == 1 and part.values.shape[2] == part.keys.shape[2] for part in parts)


@pytest.mark.parametrize("reach", [None, 6])
def test_room_grows_by_a_factor_and_drops_what_a_window_hides(reach, monkeypatch):
    sizes = []
    moved = cache_layer._moved
    monkeypatch.setattr(cache_layer, "_moved", lambda *given: sizes.append(given[3]) or moved(*given))
    layer = RingCacheLayer()
    for _ in range(400):
        held = write(layer, 1, 1, 2, (0, 3), reach)
        kept = [2 * place + 1 + layer.start for place in range(held.keys.shape[2])]
        for entry, columns in enumerate((0, 3)):
            mine = [p for p in kept if p - layer.start < held.key_lengths[entry]]
            assert held.keys[entry, 0, : len(mine), 0].tolist() == [100.0 * entry + p + columns for p in mine]
            if reach is not None and layer.length > columns:  # what the next query sees is there
                assert layer.start <= max(0, layer.length - columns - reach)
    assert len(sizes) < (60 if reach is None else 400)
    assert layer.keys.shape[2] <= (250 if reach is None else 8)
    assert layer.get_seq_length() == 400
    assert layer.get_mask_sizes(3) == (403, 0)
    assert (layer.get_max_length(), layer.get_max_cache_shape()) == (-1, -1)


def test_entries_are_repeated_chosen_and_forgotten():
    layer = RingCacheLayer()
    layer.batch_repeat_interleave(2)  # of nothing
    write(layer, 7, 0, 2)
    other = copy.deepcopy(layer)
    layer.batch_repeat_interleave(2)
    assert layer.padding == (0, 0, 2, 2, 2, 2, 5, 5)
    layer.reorder_cache(torch.tensor([7, 0]))
    assert layer.padding == (5, 0)
    assert layer.keys[:, 0, 0, 0].tolist() == [305.0, 0.0]
    assert layer.values[:, 1, 0, 0].tolist() == [-305.0, -0.0]
    layer.batch_select_indices(torch.tensor([False, True]))
    assert layer.padding == (0,)
    assert other.padding == PADDING  # which is another one
    layer.crop(-3)
    assert layer.length == 4
    layer.crop(9)  # as older transformers say: up to there
    layer.crop(0)
    assert layer.length == 4
    layer.crop(3)
    assert layer.length == 3
    layer.crop(-3)
    assert (layer.length, layer.keys, layer.is_initialized) == (0, None, False)
    write(layer, 2, 0, 2, (0, 0, 0))
    layer.reset()
    assert layer.keys is None


def test_a_window_drops_nothing_that_may_come_back():
    layer = RingCacheLayer()
    for _ in range(20):
        write(layer, 1, 0, 2, (0,), reach=3)
    assert layer.start > 0
    with pytest.raises(UnsupportedError, match=r"cannot go back from 20 to 2 tokens.*activate_past_recording"):
        layer.crop(2)
    cache = RingCache()
    cache.activate_past_recording()
    cache.update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 1), 0)
    layer = cache.layers[0]
    for _ in range(20):
        write(layer, 1, 0, 2, (0,), reach=3)
    assert layer.start == 0
    layer.crop(-15)
    assert layer.length == 5
    for _ in range(20):
        write(layer, 1, 0, 2, (0,), reach=3)
        layer.crop(0)
    assert 0 < layer.start <= 22


def test_what_does_not_fit_what_the_cache_holds_is_refused():
    layer = RingCacheLayer()
    write(layer, 4, 0, 2)
    with pytest.raises(ShapeError, match=r"holds keys of \(4, 2, 2, 3\).*new ones have shape \(3, 2, 1, 3\)"):
        write(layer, 1, 0, 2, PADDING[:3])
    with pytest.raises(KeywordError, match=r"padding of \[0, 2, 2, 5\].*goes on with \[0, 2, 1, 5\]"):
        write(layer, 1, 0, 2, (0, 2, 1, 5))
    with pytest.raises(KeywordError, match=r"as rank 0 of 2, but .* as rank 0 of 3"):
        write(layer, 1, 0, 3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_does_not_take_the_part_for_the_whole(attention):
    model, keywords = prepare("llama", "of 13", "greedy")
    with pytest.raises(UnsupportedError, match=r"the model .* the keys or values of a RingCache"):
        generate(model, attention, **keywords, past_key_values=RingCache())
    keys, _ = RingCache().update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 1), 0)
    with pytest.raises(UnsupportedError, match="calls matmul with the keys or values of a RingCache"):
        torch.matmul(torch.zeros(3), keys)


def refuses(error, said, name="llama", **changed):
    """An error when the model runs over a RingCache, before anything is kept."""
    ringcore_transformers.register("ring_of_one", ring=OfOne())
    model, cache = build(name).eval(), RingCache()
    model.set_attn_implementation("ring_of_one")
    with torch.set_grad_enabled(changed.pop("grad", False)), pytest.raises(error, match=said) as caught:
        model(**{"input_ids": draw_ids(), "past_key_values": cache, **changed})
    assert isinstance(caught.value, RingcoreError)
    assert cache.get_seq_length() == 0


def test_what_attention_over_a_cache_lacks_is_refused():
    refuses(UnsupportedError, r"gradients: call the model under torch\.no_grad", grad=True)
    refuses(UnsupportedError, "over a RingCache with chunks", "llama4")
    ends = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 6, 13]))
    refuses(UnsupportedError, "over a RingCache with packed documents", **ends)
    refuses(UnsupportedError, "not causal", is_causal=False)
    mask = torch.ones(2, 13).long()
    refuses(
        UnsupportedError,
        "entry 0, but says token in column 0: over a RingCache padding is on the left",
        attention_mask=mask.index_fill(1, torch.tensor([12]), 0),
    )
    refuses(ShapeError, r"attention_mask has shape \(2, 12\).*must be \(2, 13\)", attention_mask=mask[:, 1:])
    refuses(
        UnsupportedError, "ready-made attention_mask", attention_mask=mask.bool()[:, None, None].expand(2, 1, 13, 13)
    )
    refuses(UnsupportedError, "output_attentions", output_attentions=True)


def test_layers_that_disagree_are_refused():
    attention = ringcore_transformers.register("ring_of_one", ring=OfOne())
    x = torch.ones(4, 2, 3, 3, dtype=torch.float64)
    layer, module = RingCacheLayer(), torch.nn.Identity()
    new = new_keys(layer, 0, 3)
    with pytest.raises(KeywordError, match=r"queries from 2 on.*has 0 tokens in this layer and gets 3"):
        attention(module, x, new, new, ModelMask(True, first=2, columns=range(5)))
    with pytest.raises(UnsupportedError, match="2 queries, but 3 new keys"):
        attention(module, x[:, :, :2], new, new, ModelMask(True))
    mask = ModelMask(True)
    attention(module, x, new, new, mask)
    assert layer.length == 3
    with pytest.raises(UnsupportedError, match="a KV cache with a past"):
        attention(module, x, x, x, mask)
    mask = ModelMask(True)
    attention(module, x, x, x, mask, position_ids=torch.arange(3)[None])
    with pytest.raises(UnsupportedError, match="other layers that have none"):
        attention(module, x, new_keys(layer, 3, 3), new, mask)


def test_states_that_are_no_keys_are_refused():
    for name, said in (
        ("update_conv_state", "convolutions"),
        ("update_recurrent_state", "state spaces"),
        ("update_indexer", "indexers"),
        ("has_previous_state", "linear attention"),
    ):
        with pytest.raises(UnsupportedError, match=f"layers with .*{said}"):
            getattr(RingCache(), name)(torch.zeros(1), 0)


def test_a_model_with_linear_attention_is_refused():
    config = transformers.Qwen3NextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    ringcore_transformers.register("ring_in_process", ring_size=2)
    model = transformers.Qwen3NextForCausalLM._from_config(config, attn_implementation="ring_in_process").eval()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="whose state a RingCache lacks"):
        model(input_ids=draw_ids(), past_key_values=RingCache())


def test_tokens_are_compared_as_closely_as_devices_allow():
    from ringcore_transformers.cached_attention import _compare, _sample

    query = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    note = {"rows": 5, "past": 0, "padding": [0, 0]}
    rounded = query.bfloat16()
    _compare([{**note, **_sample(x)} for x in (query, rounded, query.double())])
    _compare([{**note, **_sample(x)} for x in (query * torch.nan, query * torch.nan)])  # which is for others to find
    other = query.clone()
    other[1, :, 2] = query[0, :, 2]
    with pytest.raises(AgreementError, match="batch entry 1 has other tokens on rank 2"):
        _compare([{**note, **_sample(x)} for x in (query, rounded, other)])
