"""The ``gemcut`` command: parse, call, show. Nothing here imports torch before a command needs it."""
