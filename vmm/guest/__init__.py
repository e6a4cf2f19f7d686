"""The host's side of the agent that runs inside a Linux guest: programs and files over a socket device."""
