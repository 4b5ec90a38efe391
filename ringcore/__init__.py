"""Exact attention over a sequence that is split across a ring of processes or devices."""

from ringcore.api import ring_attention, ring_attention_vjp
from ringcore.balance import balanced
from ringcore.call import Call, check_output_gradients
from ringcore.decoding import decode_attention
from ringcore.dilated import dilated_attention, dilated_attention_vjp
from ringcore.dilation import check_dilation
from ringcore.discovery import find_ring, find_transport
from ringcore.documents import Documents, read_documents
from ringcore.dropout import Dropout
from ringcore.errors import (
    AgreementError,
    DeviceError,
    DtypeError,
    FileError,
    KeywordError,
    LayoutError,
    MissingDependency,
    PeerError,
    RingcoreError,
    RingTimeout,
    ShapeError,
    TransportError,
    UnsupportedError,
)
from ringcore.exchange import places_at_home
from ringcore.explanation import Explanation, explain
from ringcore.grid import Grid, grid_of
from ringcore.inputs import Inputs
from ringcore.layout import Layout, contiguous, from_lengths, layout_of_lengths, resolve_layout, striped, zigzag
from ringcore.merge import empty_partial, merge
from ringcore.partial import Partial, accumulation_dtype, dtype_name
from ringcore.partition import shard, unshard
from ringcore.prepared import Result
from ringcore.protocols import Kernels, OneSided, Pending, Reducing, Sharing, Transport
from ringcore.routes import DoubleRing
from ringcore.values import Array, Band, Blocks, Capabilities, Gradients, Move, Plan, Score, Spec, Step, Tile

__version__ = "0.1.0"

__all__ = [
    "AgreementError",
    "Array",
    "Band",
    "Blocks",
    "Call",
    "Capabilities",
    "DeviceError",
    "Documents",
    "DoubleRing",
    "Dropout",
    "DtypeError",
    "Explanation",
    "FileError",
    "Gradients",
    "Grid",
    "Inputs",
    "Kernels",
    "KeywordError",
    "Layout",
    "LayoutError",
    "MissingDependency",
    "Move",
    "OneSided",
    "Partial",
    "PeerError",
    "Pending",
    "Plan",
    "Reducing",
    "Result",
    "RingTimeout",
    "RingcoreError",
    "Score",
    "ShapeError",
    "Sharing",
    "Spec",
    "Step",
    "Tile",
    "Transport",
    "TransportError",
    "UnsupportedError",
    "accumulation_dtype",
    "balanced",
    "check_dilation",
    "check_output_gradients",
    "contiguous",
    "decode_attention",
    "dilated_attention",
    "dilated_attention_vjp",
    "dtype_name",
    "empty_partial",
    "explain",
    "find_ring",
    "find_transport",
    "from_lengths",
    "grid_of",
    "layout_of_lengths",
    "merge",
    "places_at_home",
    "read_documents",
    "resolve_layout",
    "ring_attention",
    "ring_attention_vjp",
    "shard",
    "striped",
    "unshard",
    "zigzag",
]
