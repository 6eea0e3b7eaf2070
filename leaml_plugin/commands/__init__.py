"""One module a sub-command, where the command needs more than the function that it calls."""
