"""Shared directories (virtio 1.2, 5.11): the FUSE messages, and a directory of the host behind them."""
