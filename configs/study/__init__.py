"""The studies of docs/results.md: `hola study configs/study/NAME.py` runs what one lacks and prints its table."""
