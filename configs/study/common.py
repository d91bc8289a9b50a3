"""What the studies on planted facts share."""

from hola_jax import MemoryConfig, ModelConfig
from train.config import CheckpointConfig, TrainConfig
from train.data.config import Facts
from train.optimizer import OptimizerConfig
from train.study import Measure

# A dozen facts among noise, told up to six blocks before they are asked for: the state of a layer has 2 heads x 16 x 16
# numbers, the cache room for 16 of the 96 tokens before the questions. The gate begins half open: at the paper's -4 the
# cache adds a fiftieth of what it reads, too little to be learned from in so few steps (configs/study/gate.py).
MODEL = ModelConfig(
    vocab_size=192,
    dim=64,
    layers=2,
    heads=2,
    key_dim=16,
    value_dim=16,
    mlp_dim=64,
    gate_init=0.0,
    dtype="float32",
    memory=MemoryConfig(window=16, block=16, chunk=16),
)
BASE = TrainConfig(
    run="",
    model=MODEL,
    data=Facts(),
    optimizer=OptimizerConfig(peak=3e-3, warmup=150),
    checkpoint=CheckpointConfig(every=1000, keep=1, keep_best=0),
    steps=3000,
    global_batch=8,  # small: steps teach this task, not tokens
    row=128,
    log_every=50,
    eval_every=200,
)
NEEDLE = Facts(most=1, told=(0.05, 0.15))
FACTS = {
    "1 fact": Measure(Facts(most=1)),
    "4 facts": Measure(Facts(most=4, fewest=4)),
    "12 facts": Measure(Facts(most=12, fewest=12)),
    "24 facts": Measure(Facts(most=24, fewest=24)),  # more than in training, and than the cache has room for
    "needle at 128": Measure(NEEDLE),
    "at 512": Measure(NEEDLE, length=512),
    "at 2048": Measure(NEEDLE, length=2048),
}
LENGTHS = ("needle at 128", "at 512", "at 2048")
