"""The one exception for what a user can mend: its message says what came, what was expected and what to do."""


class UserError(ValueError):
    """Bad input. The command line prints the message as one line on stderr and exits with code 2."""
