"""One thread for each test process and what it starts: there are as many processes as cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
