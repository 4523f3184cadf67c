"""`python -m geopose_dist`: what torchrun starts on every rank."""

import sys

from geopose_dist.cli import main

sys.exit(main())
