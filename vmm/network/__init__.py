"""Networks that the daemon makes on the host: bridges, who may pass between them, addresses for their guests."""
