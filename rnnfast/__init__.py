"""rnnfast: a drop-in ``torch.nn.RNN`` whose whole time loop is one fused kernel."""

from importlib import metadata as _metadata

from . import backends, functional, onnx
from .backends import FallbackWarning, backend
from .modules import RNN, RNNCell
from .swapping import patch, restore, swap

if backends.extension_error is None:
    from . import batching, ops

    ops.register()
    batching.register()

try:
    __version__ = _metadata.version("rnnfast")
except _metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "RNN",
    "FallbackWarning",
    "RNNCell",
    "backend",
    "functional",
    "onnx",
    "patch",
    "restore",
    "swap",
]
