"""``python -m ringcore.cli`` is the command ``ringcore``."""

from ringcore.cli.main import run

run()
