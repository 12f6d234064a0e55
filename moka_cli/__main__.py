"""`python -m moka_cli`: the command `moka`."""

from moka_cli.main import main

main()
