"""A small HOLA on a folder of text files: `hola train configs/text_folder.py --data.path=FOLDER --run=runs/mine`."""

import dataclasses

from configs import demo
from train.data.config import TextFolder

config = dataclasses.replace(demo.config, run="runs/text_folder", data=TextFolder(path="."), steps=1000)
