"""Programs that nobody vouches for, each in a machine of its own: from Python (box.py) and over HTTP (serve/)."""
