"""`python -m mefem_cli` is the same as `mefem`."""

from mefem_cli.main import main

main()
