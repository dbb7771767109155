"""What needs an NVIDIA GPU: skipped where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in str(item.path).replace("\\", "/"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that torch can use"))
