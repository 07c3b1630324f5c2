"""`python -m nlhf_kernels`, for where the script `nlhf-kernels` is not on the PATH."""

from .cli.main import main

raise SystemExit(main())
