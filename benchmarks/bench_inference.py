"""Forward passes alone: the logits of every token or image, without gradients."""

from benchmarks.command import main
from benchmarks.models import model_benchmark

BENCHMARK = model_benchmark("inference", "A forward pass", learns=False)

if __name__ == "__main__":
    main(BENCHMARK)
