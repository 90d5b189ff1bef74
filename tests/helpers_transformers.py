"""The reference, importable on a machine whose torchvision has no compiled operators."""

from types import ModuleType

_LIBRARIES: list[object] = []


def import_transformers() -> ModuleType:
    """`transformers`, with torchvision usable for resizing; skips the test where the reference is not installed."""
    import pytest  # not above: the environment of transformers 5.24 has none, and needs the other function

    pytest.importorskip("torch")
    define_torchvision_operators()
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


def define_torchvision_operators() -> None:
    """Define two operators that a torchvision wheel beside a CPU build of torch lacks, and wants at import."""
    import torch

    # FRAGMENT may be opened more than once in a process; the library must stay alive.
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _LIBRARIES.append(library)
