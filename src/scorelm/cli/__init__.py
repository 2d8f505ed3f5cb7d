"""The ``scorelm`` command: one file a verb, whose options are the models of `scorelm.config`.

Only this file and `entry` are loaded by ``scorelm --help``; a verb is imported when it is asked for.
"""

from scorelm.cli.entry import VERBS, main

__all__ = ["VERBS", "main"]
