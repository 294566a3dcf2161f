"""`python -m cascade` is the console command."""

from cascade.cli import main

main()
