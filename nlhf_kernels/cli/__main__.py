"""`python -m nlhf_kernels.cli`, another spelling of `python -m nlhf_kernels`."""

from .main import main

raise SystemExit(main())
