"""Every error that ringcore raises derives from RingcoreError and from the fitting built-in."""


class RingcoreError(Exception):
    """The base of every error that ringcore raises itself."""


class ShapeError(RingcoreError, ValueError):
    """An array has the wrong number of axes, or lengths that do not fit the other arrays."""


class DtypeError(RingcoreError, TypeError):
    """An array holds numbers of a kind that attention is not defined for, or mixes kinds."""


class DeviceError(RingcoreError, ValueError):
    """Arrays of one call live on different devices, or belong to different libraries."""


class KeywordError(RingcoreError, ValueError):
    """A keyword has a value that cannot be honoured."""


class LayoutError(RingcoreError, ValueError):
    """A layout is unknown, is not a partition of the positions, or does not fit the ring."""


class UnsupportedError(RingcoreError, NotImplementedError):
    """The chosen kernels or transport cannot do what was asked."""


class MissingDependency(RingcoreError, ImportError):
    """An adapter needs a library that is not installed, or cannot be imported."""


class AgreementError(RingcoreError, ValueError):
    """The ranks of a ring called with different shapes or keywords."""


class PeerError(RingcoreError, RuntimeError):
    """Another rank of the ring failed, so this rank stopped too."""


class RingTimeout(RingcoreError, TimeoutError):
    """A peer did not answer before the deadline."""


class TransportError(RingcoreError, RuntimeError):
    """The ring cannot be used: a wrong launcher, an aborted ring, a failed exchange."""


class FileError(RingcoreError, OSError):
    """A tensor file is missing, truncated or lacks a tensor, or cannot be written."""
