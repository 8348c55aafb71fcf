"""Declares what torchvision's CUDA build registers itself, right before it is imported."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SCHEMAS = ("nms", "qnms")
_keep: list[object] = []


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing; it only sees that the import begins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Declare the operators once."""
        del path, target
        if fullname == "torchvision":
            import torch  # noqa: PLC0415  only where it is about to be imported anyway

            sys.meta_path.remove(self)
            library = torch.library.Library("torchvision", "DEF")
            for name in SCHEMAS:
                library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
            _keep.append(library)
        return None


sys.meta_path.insert(0, BeforeTorchvision())
