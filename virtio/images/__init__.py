"""Disk image files: their headers, chains of them, checking and changing them while no machine uses them."""
