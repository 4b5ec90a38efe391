"""ringcore on array-api-strict, which has nothing but the standard: audit ringcore:ring_attention."""

import array_api_strict
import numpy as np

ACCEPTS = (
    "causal", "grouped", "window", "scale", "softcap", "mask", "bias", "documents", "key_lengths", "sinks", "alibi",
    "prefix",
)  # fmt: skip
LIBRARY = "numpy"


def attention(function, q, k, v, **keywords):
    arrays = {"mask", "bias", "sinks", "alibi"}
    given = {name: array_api_strict.asarray(x) if name in arrays else x for name, x in keywords.items()}
    if "prefix" in given:
        given["prefix"] = tuple(map(array_api_strict.asarray, given["prefix"]))
    return np.asarray(function(*map(array_api_strict.asarray, (q, k, v)), **given))
