"""Products of a token with a matrix by ggml, the library of llama.cpp, out of the wheel of pywhispercpp; by ctypes."""

import ctypes
import importlib.metadata
import time

import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q8_0": 8, "Q4_0": 2}
"""Name -> ggml's number of it."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def available() -> bool:
    """Whether the wheel is installed."""
    try:
        return any("libggml-cpu" in file.name for file in importlib.metadata.files("pywhispercpp") or ())
    except importlib.metadata.PackageNotFoundError:
        return False


def _library() -> ctypes.CDLL:
    """The library, with the types of what is called."""
    files = importlib.metadata.files("pywhispercpp") or ()
    for part in ("libggml-base", "libggml-cpu"):  # the second needs the first
        path = next(file for file in files if file.name.startswith(part) and "pywhispercpp.libs" in str(file))
        library = ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, size, size]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_mul_mat", pointer, [pointer] * 3),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer] * 2),
        ("ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, size, size, size, pointer]),
        ("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Product:
    """A random matrix of one of `TYPES`, and a token to multiply it with."""

    def __init__(self, kind: str, inputs: int, outputs: int, threads: int):
        self._library, self._threads = _library(), threads
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((outputs, inputs), np.float32)
        token = rng.standard_normal(inputs, np.float32)
        self.expected = matrix @ token
        g = self._library
        self._context = g.ggml_init(_InitParams(5 * matrix.size + (64 << 20), None, False))
        weights = g.ggml_new_tensor_2d(self._context, TYPES[kind], inputs, outputs)
        x = g.ggml_new_tensor_2d(self._context, TYPES["F32"], inputs, 1)
        g.ggml_quantize_chunk(TYPES[kind], matrix.ctypes.data, g.ggml_get_data(weights), 0, outputs, inputs, None)
        ctypes.memmove(g.ggml_get_data(x), token.ctypes.data, token.nbytes)
        self._result = g.ggml_mul_mat(self._context, weights, x)
        self._graph = g.ggml_new_graph(self._context)
        g.ggml_build_forward_expand(self._graph, self._result)

    def seconds(self) -> float:
        """Multiply; how long it took."""
        begun = time.perf_counter()
        status = self._library.ggml_graph_compute_with_ctx(self._context, self._graph, self._threads)
        taken = time.perf_counter() - begun
        assert status == 0, status
        return taken

    def error(self) -> float:
        """Largest error of the last product, relative to the largest number."""
        data = self._library.ggml_get_data(self._result)
        found = np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), self.expected.shape)
        return float(np.abs(found - self.expected).max() / np.abs(self.expected).max())
