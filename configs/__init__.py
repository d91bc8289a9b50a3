"""One small Python file per experiment, each with a `config`. `hola train configs/demo.py --steps=200` runs one."""
