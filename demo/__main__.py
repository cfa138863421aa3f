"""The tour of the method: python -m demo. See tour.py."""
import console
from demo.tour import main

console.run(main)
