"""The console: a ring of output with any number of watchers, its socket, and the user's terminal."""
