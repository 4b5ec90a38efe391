"""The command line: ``ringcore attend`` and its relatives. Needs the extra "cli"."""
