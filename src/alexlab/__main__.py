"""`python -m alexlab VERB key=value ...`, the same as the console script `alexlab`."""

from alexlab.commands.cli import main

main()
