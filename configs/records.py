"""A small HOLA on what `hola prepare` made: `hola train configs/records.py --data.path=FOLDER --run=runs/mine`."""

import dataclasses

from configs import demo
from train.data.config import Records

config = dataclasses.replace(
    demo.config,
    run="runs/records",
    data=Records(path="slimpajama"),
    model=dataclasses.replace(demo.config.model, vocab_size=32000),
    steps=1000,
)
