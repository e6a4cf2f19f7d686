"""Moving a running machine to another host."""
