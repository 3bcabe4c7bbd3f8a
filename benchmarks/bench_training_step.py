"""Whole training steps: zero_grad, forward, loss, backward, AdamW, on fixed random data.

Every variant is the same model with the same first weights, see rivals.py and steps.py. With
--dropout all of them drop attention weights, both branches of a block and embeddings. Peak memory
is that of a process per variant.
"""

from benchmarks.command import main
from benchmarks.models import model_benchmark

BENCHMARK = model_benchmark("training_step", "A training step", learns=True)

if __name__ == "__main__":
    main(BENCHMARK)
