"""What needs an NVIDIA GPU: skipped where there is none."""

import os

import pytest
import torch

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read once, when a process first multiplies; Lightning would set it for exact runs alone


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in str(item.path).replace("\\", "/"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that torch can use"))
