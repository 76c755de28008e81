"""What ``gpu.py`` runs: its parts, the processes that they run in, and what becomes of their figures."""
