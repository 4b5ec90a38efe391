"""``ringcore attend`` in one process: every option, both formats, all dtypes, against a dense oracle."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import DTYPES, TOLERANCES, load, lse_tolerance, qkv, save_safetensors
from dense import dense

pytestmark = pytest.mark.timeout(60)


def largest_difference(came, due):
    empty = np.isneginf(due)
    assert np.array_equal(np.isneginf(came), empty)
    return np.abs(np.where(empty, 0, came) - np.where(empty, 0, due)).max()


@pytest.fixture
def attended(ringcore, tmp_path):
    """Attend q, k, v with options; the written out and lse agree with the dense oracle's for ``keywords``."""

    def call(arrays, *options, dtype="float32", **keywords):
        source = tmp_path / "qkv.safetensors"
        save_safetensors(source, dict(zip("qkv", arrays, strict=True)))
        answer = ringcore("attend", source, "--out", "o.safetensors", "--lse", "--check", 9, "--json", *options)
        assert answer.status == 0, answer.err
        assert answer.err == ""
        out, lse = dense(*arrays, **keywords)
        came, came_dtype = load(tmp_path / "o.safetensors")
        assert came_dtype == dtype
        assert largest_difference(came, out) <= TOLERANCES[dtype]
        came_lse, lse_dtype = load(tmp_path / "o.safetensors", "lse")
        assert lse_dtype == ("float64" if dtype == "float64" else "float32")
        assert largest_difference(came_lse, lse) <= lse_tolerance(dtype, options)
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors") == [
            "o.safetensors",
            "qkv.safetensors",
        ]
        return json.loads(answer.out)

    return call


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ([], {}),
        (["--causal"], {"causal": True}),
        (["--window", "3,none"], {"window": (3, None)}),
        (["--window", "2,1"], {"window": (2, 1)}),
        (["--window", "none,0"], {"window": (None, 0)}),
        (["--window", "none"], {}),
        (["--window", "4", "--causal"], {"window": 4, "causal": True}),
        (["--scale", "0.7"], {"scale": 0.7}),
        (["--softcap", "1.5"], {"softcap": 1.5}),
        (["--query-offset", "-5", "--causal"], {"query_offset": -5, "causal": True}),
        (["--query-offset", "3,-2", "--causal"], {"query_offset": (3, -2), "causal": True}),
        (["--key-lengths", "10,0"], {"key_lengths": (10, 0)}),
        (["--kernels", "reference"], {}),
        (["--kernels", "numpy"], {}),
        (["--backend", "reference", "--causal"], {"causal": True}),
        (["--backend", "torch", "--causal"], {"causal": True}),
        (["--ring-size", "3"], {}),
        (["--ring-size", "3", "--causal"], {"causal": True}),
        (["--ring-size", "4", "--layout", "striped", "--causal"], {"causal": True}),
        (["--ring-size", "30", "--layout", "zigzag"], {}),
        (["--layout", "striped"], {}),
        (["--dilated", "4:1,8:2,50:4"], {"dilated": [(4, 1), (8, 2), (50, 4)]}),
        (["--dilated", "7:3", "--head-offset", "block", "--causal", "--ring-size", "3"],
         {"dilated": [(7, 3)], "block": True, "causal": True}),
        (["--dilated", "9:2", "--key-lengths", "10,3", "--softcap", "1.5", "--backend", "torch"],
         {"dilated": [(9, 2)], "key_lengths": (10, 3), "softcap": 1.5}),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_option_reaches_the_attention(attended, options, keywords):
    attended(qkv(), *options, **keywords)


@pytest.mark.parametrize("options", [[], ["--backend", "torch"], ["--backend", "reference"]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_and_written(attended, dtype, options):
    arrays = qkv(dtype=dtype)
    summary = attended(arrays, "--causal", *options, dtype=dtype, causal=True)
    assert summary["dtype"] == dtype


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", ["float64", "bfloat16"])
def test_inputs_are_converted(ringcore, tmp_path, source, target):
    arrays = qkv(dtype=source)
    save_safetensors(tmp_path / "x.safetensors", dict(zip("qkv", arrays, strict=True)))
    answer = ringcore("attend", "x.safetensors", "--out", "o.safetensors", "--dtype", target, "--check", 5)
    assert answer.status == 0, answer.err
    assert "passed" in answer.out
    came, dtype = load(tmp_path / "o.safetensors")
    assert dtype == target
    out, _ = dense(*(x.astype(DTYPES[target]) for x in arrays))
    assert largest_difference(came, out) <= TOLERANCES[target]


def test_inputs_of_several_dtypes_are_converted(ringcore, refused, tmp_path):
    q, k, v = qkv(dtype="float64")
    save_safetensors(tmp_path / "x.safetensors", {"q": q, "k": k.astype(np.float32), "v": v.astype(np.float16)})
    assert "must share one dtype" in refused(2, "attend", "x.safetensors", "--out", "o.safetensors")
    assert ringcore("attend", "x.safetensors", "--out", "o.safetensors", "--dtype", "float32", "--check", 3).status == 0


@pytest.mark.parametrize("options", [[], ["--ring-size", "3", "--layout", "zigzag"], ["--backend", "torch"]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_with_the_sequence_before_the_heads(ringcore, tmp_path, options, dtype):
    arrays = qkv(dtype=dtype)
    save_safetensors(tmp_path / "x.safetensors", {n: x.swapaxes(1, 2) for n, x in zip("qkv", arrays, strict=True)})
    answer = ringcore(
        "attend",
        "x.safetensors",
        "--out",
        "o.safetensors",
        "--axes",
        "bshd",
        "--lse",
        "--causal",
        "--check",
        9,
        *options,
    )
    assert answer.status == 0, answer.err
    out, lse = dense(*arrays, causal=True)
    assert largest_difference(load(tmp_path / "o.safetensors")[0].swapaxes(1, 2), out) <= TOLERANCES[dtype]
    assert largest_difference(load(tmp_path / "o.safetensors", "lse")[0], lse) <= lse_tolerance(dtype, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy_files(ringcore, tmp_path, dtype):
    arrays = qkv(dtype=dtype)
    for name, x in zip("qkv", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", x)
    source = ["--q", "q.npy", "--k", "k.npy", "--v", "v.npy"]
    answer = ringcore("attend", *source, "--out", "o.npy", "--lse", "--check", 5)
    assert answer.status == 0, answer.err
    out, lse = dense(*arrays)
    came, came_dtype = load(tmp_path / "o.npy")
    assert came_dtype == dtype
    assert largest_difference(came, out) <= TOLERANCES[dtype]
    assert largest_difference(load(tmp_path / "o.lse.npy")[0], lse) <= 5e-6
    assert ringcore("attend", *source, "--out", "p.npy", "--lse-out", "other.npy").status == 0
    assert (tmp_path / "other.npy").read_bytes() == (tmp_path / "o.lse.npy").read_bytes()
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "o.npy").read_bytes()


def test_big_endian_npy_is_read(ringcore, tmp_path):
    arrays = qkv()
    for name, x in zip("qkv", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", x.astype(">f4"))
    assert ringcore("attend", "--q", "q.npy", "--k", "k.npy", "--v", "v.npy", "--out", "o.npy").status == 0
    came, dtype = load(tmp_path / "o.npy")
    assert dtype == "float32"
    assert largest_difference(came, dense(*arrays)[0]) <= 5e-6


@pytest.mark.parametrize("backend", ["numpy", "reference", "torch"])
@pytest.mark.parametrize("shape", [(2, 4, 23, 19), (1, 1, 23, 19), (2, 1, 1, 19), (23, 19), (4, 23, 1), (1, 19)])
@pytest.mark.parametrize("term", ["bias", "mask"])
def test_bias_and_mask(attended, tmp_path, term, shape, backend):
    rng = np.random.default_rng(5)
    x = rng.normal(size=shape).astype(np.float32)
    if term == "mask":
        x = x > -0.5
    else:
        x[x < -1] = -np.inf
    np.save(tmp_path / "term.npy", x)
    options = ["--ring-size", "3"] if backend == "numpy" else []
    attended(qkv(keys=19), f"--{term}", "term.npy", "--backend", backend, *options, **{term: x})


def test_tensors_of_other_names(ringcore, tmp_path):
    arrays = qkv()
    save_safetensors(tmp_path / "x.safetensors", dict(zip(["query", "key", "value"], arrays, strict=True)))
    names = ["--q-name", "query", "--k-name", "key", "--v-name", "value"]
    assert ringcore("attend", "x.safetensors", *names, "--out", "o.safetensors").status == 0
    assert largest_difference(load(tmp_path / "o.safetensors")[0], dense(*arrays)[0]) <= 5e-6


def test_queries_and_keys_of_different_lengths(attended):
    attended(qkv(rows=3, keys=40), "--causal", "--query-offset", "37", causal=True, query_offset=37)


def test_an_empty_sequence(attended, ringcore, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", dict(zip("qkv", qkv(rows=0, keys=4), strict=True)))
    assert ringcore("attend", "x.safetensors", "--out", "o.safetensors", "--check", 3).status == 0
    assert load(tmp_path / "o.safetensors")[0].shape == (2, 4, 0, 3)


def test_output_is_the_same_for_every_chunk_of_reading(ringcore, tmp_path, monkeypatch):
    arrays = qkv(rows=50, keys=50)
    save_safetensors(tmp_path / "x.safetensors", {n: x.swapaxes(1, 2) for n, x in zip("qkv", arrays, strict=True)})
    call = ["attend", "x.safetensors", "--axes", "bshd", "--force", "--out", "o.safetensors"]
    assert ringcore(*call).status == 0
    due = (tmp_path / "o.safetensors").read_bytes()
    monkeypatch.setattr("ringcore.cli.tensors.CHUNK", 200)
    monkeypatch.setattr("ringcore.cli.check._BYTES", 4000)
    assert ringcore(*call, "--check", 50).status == 0
    assert (tmp_path / "o.safetensors").read_bytes() == due


def test_summary_tells_what_was_done(ringcore, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", dict(zip("qkv", qkv(), strict=True)))
    answer = ringcore("attend", "x.safetensors", "--out", "o.safetensors", "--causal", "--ring-size", 2, "--check", 2)
    for word in (
        "[2, 4, 23, 5]",
        "float32",
        "zigzag (the default",
        "2, all in one process",
        "numpy",
        "GFLOP/s",
        "passed: 2 rows",
    ):
        assert word in answer.out
    assert ringcore("attend", "x.safetensors", "--out", "p.safetensors", "--quiet").out == ""
    summary = json.loads(ringcore("attend", "x.safetensors", "--out", "r.safetensors", "--json", "--window", "4,2").out)
    assert summary["layout"] == "contiguous"
    positions = np.subtract.outer(np.arange(23), np.arange(23))
    assert summary["visible_pairs"] == 8 * np.count_nonzero((positions <= 4) & (positions >= -2))
    assert summary["peak_memory_bytes"] > summary["shard_bytes"] > 0
    assert "check" not in summary


def test_poison_that_is_hidden_stays_hidden(ringcore, tmp_path):
    q, k, v = qkv()
    v[:, :, 20:] = np.nan
    save_safetensors(tmp_path / "x.safetensors", {"q": q, "k": k, "v": v})
    assert ringcore("attend", "x.safetensors", "--out", "o.safetensors", "--causal", "--check", 23).status == 0
    came, _ = load(tmp_path / "o.safetensors")
    assert np.isfinite(came[:, :, :20]).all()
    assert np.isnan(came[:, :, 20:]).all()


@pytest.mark.parametrize(("need", "option", "value"), [("window", "2,1", (2, 1)), ("softcap", "1.5", 1.5)])
def test_kernels_without_what_the_call_needs_are_passed_over(attended, monkeypatch, need, option, value):
    from ringcore_numpy import kernels

    monkeypatch.setattr(kernels, "_CAPABILITIES", replace(kernels._CAPABILITIES, **{need: False}))
    assert attended(qkv(), f"--{need}", option, **{need: value})["kernels"] == "reference"
    assert attended(qkv(), "--force")["kernels"] == "numpy"
