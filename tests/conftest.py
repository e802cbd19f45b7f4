"""What every test has."""

from __future__ import annotations

import os

# what was measured on this machine must not decide what a test sees, in this process or another
os.environ["STREAMMERGE_PROFILE"] = ""
