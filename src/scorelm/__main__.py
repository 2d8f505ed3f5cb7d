"""``python -m scorelm`` is the ``scorelm`` command, for torchrun."""

from scorelm.cli import main

main()
