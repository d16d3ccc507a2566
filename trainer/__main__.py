"""`python -m trainer`: the same commands as the console script."""

from trainer.cli import main

main()
