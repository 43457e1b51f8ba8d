"""`native`: the core's internals, compiled from `*.cc` here by a development build only.

TWINFUSE_TEST_CORE names a folder with another build of it (the sanitized one).
"""

from __future__ import annotations

import os

if os.environ.get("TWINFUSE_TEST_CORE"):
    __path__.insert(0, os.environ["TWINFUSE_TEST_CORE"])
