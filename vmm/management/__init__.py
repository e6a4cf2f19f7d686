"""How other processes find a machine and steer it: the registry of names and the control socket."""
