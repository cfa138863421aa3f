"""Run every method on one checkpoint: python -m compare. See harness.py."""
import console
from compare.harness import main

console.run(main, torchrun="apart")
