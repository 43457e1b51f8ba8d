"""Tests of the GPU kernels without a GPU, in Triton's interpreter.

Triton decides when a kernel is defined whether it is interpreted, its own library's included, so
these tests run in a process of their own: `TRITON_INTERPRET=1 pytest tests/gpu`.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
