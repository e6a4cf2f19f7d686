"""`vmm serve`: sandboxes over HTTP, as the clients of E2B's API speak it.

Two surfaces: the control API (control.py), by which sandboxes are made, found, paused and ended, and what a sandbox
offers itself (process_service.py, filesystem_service.py, files.py, and ports by proxy.py): programs, terminals, files.
The second is served from here too, through the machine's agent, so that an image needs nothing for it. fleet.py keeps
the sandboxes; it knows no HTTP. Needs the extra `serve`.
"""
