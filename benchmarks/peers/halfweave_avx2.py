"""halfweave's own decoder with the kernels of a machine without AVX-512: MODEL THREADS."""

from __future__ import annotations

import os

os.environ["HALFWEAVE_CPU_LEVEL"] = "avx2"  # read when the kernels are loaded

from halfweave_engine import Halfweave
from worker import serve

serve(Halfweave)
