"""`hola plan`: the real step compiled for chips that are not there, what it needs on each, and how long it may take."""
