"""What the studies on planted facts share."""

from hola_jax import MemoryConfig, ModelConfig
from train.config import CheckpointConfig, TrainConfig
from train.data.config import Facts
from train.optimizer import OptimizerConfig
from train.study import Measure

# The state of a layer has 2 heads x 16 x 16 numbers: too few for a dozen facts among a hundred tokens of noise. The
# facts stand up to six blocks back, and the cache holds 16 of the 96 tokens before the questions.
MODEL = ModelConfig(
    vocab_size=192,
    dim=64,
    layers=2,
    heads=2,
    key_dim=16,
    value_dim=16,
    dtype="float32",
    memory=MemoryConfig(window=16, block=16, chunk=16),
)
BASE = TrainConfig(
    run="",
    model=MODEL,
    data=Facts(),
    optimizer=OptimizerConfig(peak=3e-3, warmup=150),
    checkpoint=CheckpointConfig(every=500, keep=1, keep_best=0),
    steps=3000,
    global_batch=16,
    row=128,
    log_every=50,
    eval_every=250,
)
FACTS = {
    "far needle": Measure(Facts(most=1, told=(0.05, 0.15)), rows=512),
    "1 fact": Measure(Facts(most=1), rows=512),
    "4 facts": Measure(Facts(most=4, fewest=4), rows=256),
    "12 facts": Measure(Facts(most=12, fewest=12), rows=256),
}
