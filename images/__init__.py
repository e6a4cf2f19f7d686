"""Kernels, initramfs and disk images: recipes and builder; tiny guests. Imports no other package here."""
