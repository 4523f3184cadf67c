"""Distributed training and inference of geocentric pose from one oblique satellite image.

Importing this package loads neither torch nor ray; each module imports what it needs.
"""

__version__ = "0.1.0"
