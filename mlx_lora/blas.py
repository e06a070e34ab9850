"""Loads OpenBLAS before MLX on Linux.

MLX's CPU wheel for Linux carries the reference BLAS, which multiplies fp32 matrices 25 to 80 times slower than
OpenBLAS. Symbols of a library loaded globally before ``mlx.core`` take precedence, so loading is all it takes.
On macOS (Accelerate, Metal) nothing is needed and nothing is done.
"""

import ctypes
import ctypes.util
import sys

loaded = False
too_late = False  # MLX had been imported before


def preload() -> None:
    """Loads OpenBLAS where it can be found; called by the package's ``__init__``, before anything imports MLX."""
    global loaded, too_late
    if not sys.platform.startswith("linux"):
        return
    if "mlx.core" in sys.modules:
        too_late = True
        return
    for name in ("libopenblas.so.0", ctypes.util.find_library("openblas")):
        try:
            ctypes.CDLL(name or "", mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        loaded = True
        return
