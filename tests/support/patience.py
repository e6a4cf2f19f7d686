"""How patient tests are: `LOOPVISOR_PATIENCE` multiplies their deadlines, for hosts that emulate (tests.rig) and builds
with sanitizers (.ci/sanitize)."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("LOOPVISOR_PATIENCE", "1"))
