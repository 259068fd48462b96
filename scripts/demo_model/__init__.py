"""Build a real mixture-of-experts model from a small dense one, in closed form."""

import os

# One BLAS thread each; the parallelism is over blocks of rows (see parallel.py). The
# libraries read these when numpy is imported, which the modules of this package do.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_name, "1")
