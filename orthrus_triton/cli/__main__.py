"""`python -m orthrus_triton.cli`: the command from a source tree that is not installed."""

from orthrus_triton.cli import main

main()
