"""What all tests share: native kernels are demanded, so that no silent fallback passes for them."""

import os

# Before anything imports ddfup.ops. `DDFUP_KERNELS=torch pytest` runs the same suite on the PyTorch kernels.
os.environ.setdefault("DDFUP_KERNELS", "native")
