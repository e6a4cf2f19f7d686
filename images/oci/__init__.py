"""Images of the Open Container Initiative: from a registry, a directory or an archive to one read-only file system."""
