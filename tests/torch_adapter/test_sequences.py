"""Parts of a tile as flash-attn-4 is told of them: on the CPU, without its kernels."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ringcore import Band, Tile, UnsupportedError
from ringcore.grouping import grouped


def sequences(capturing):
    """The module by itself: its package wants flash-attn-4."""
    (folder,) = importlib.util.find_spec("ringcore_flash4").submodule_search_locations
    spec = importlib.util.spec_from_file_location("sequences", Path(folder) / "sequences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Sequences(capturing)


def tile_of(*parts, step=1):
    def one(rows, columns):
        sides = (slice(side.start * step, side.stop * step - step + 1, step) for side in (rows, columns))
        return Tile(slice(0, 2), slice(0, 1), slice(0, 1), *sides, (rows,), (columns,), Band(None, 0))

    (tile,) = grouped(one(range(*rows), range(*columns)) for rows, columns in parts)
    return tile


@pytest.mark.parametrize("step", [1, 3])
def test_gaps_are_sequences_of_rows_or_of_keys_alone(step):
    tile = tile_of(((0, 4), (0, 4)), ((6, 7), (5, 6)), step=step)
    found = sequences(lambda: False).of(tile, batch=2, rows=9, keys=8, device=torch.device("cpu"))
    # Of each entry: a part; two rows alone, a key alone; a part; two rows and two keys alone.
    assert found["cu_seqlens_q"].tolist() == [0, 4, 6, 6, 7, 9, 9, 13, 15, 15, 16, 18, 18]
    assert found["cu_seqlens_k"].tolist() == [0, 4, 4, 5, 6, 6, 8, 12, 12, 13, 14, 14, 16]
    assert (found["max_seqlen_q"], found["max_seqlen_k"]) == (4, 4)
    assert found["cu_seqlens_q"].dtype == torch.int32


@pytest.mark.parametrize("step", [1, 3])
def test_parts_of_one_size_without_gaps_are_known(step):
    known, capturing = sequences(lambda: False), sequences(lambda: True)
    equal = tile_of(*(((a, a + 4), (a, a + 4)) for a in range(0, 20, 4)), step=step)
    assert known.equal(equal, rows=20, keys=20) == capturing.equal(equal, rows=20, keys=20) == 5
    assert known.equal(equal, rows=21, keys=20) == known.equal(equal, rows=20, keys=21) == 0
    for parts in (
        (((0, 4), (0, 4)), ((5, 9), (4, 8))),
        (((0, 4), (0, 4)), ((4, 8), (5, 9))),
        (((0, 3), (0, 3)), ((3, 8), (3, 8))),
    ):
        tile = tile_of(*parts, step=step)
        assert (
            known.equal(tile, rows=max(stop for (_, stop), _ in parts), keys=max(stop for _, (_, stop) in parts)) == 0
        )


def test_what_a_graph_was_given_is_kept_and_made_before():
    capturing = False
    known = sequences(lambda: capturing)
    tile, other = tile_of(((0, 4), (0, 4)), ((4, 6), (4, 6))), tile_of(((0, 3), (0, 3)), ((4, 6), (4, 6)))
    with torch.inference_mode():
        found = known.of(tile, 1, 6, 6, torch.device("cpu"))
    assert not found["cu_seqlens_q"].is_inference()
    capturing = True
    assert known.of(tile, 1, 6, 6, torch.device("cpu")) is found
    assert known._captured == [found]
    with pytest.raises(UnsupportedError, match="captured before they ever ran"):
        known.of(other, 1, 6, 6, torch.device("cpu"))
