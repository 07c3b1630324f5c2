"""`python -m nlhf_kernels.cli`, for where the script is not on the PATH."""

from .main import main

raise SystemExit(main())
