"""Write the raw 16 x 16 pixel baseline of some crops as a feature store. Usage: pixel_store.py OUT.h5 CROPS..."""

from __future__ import annotations

import sys
from pathlib import Path

from mefem_cli.demo import write_pixel_store
from mefem_cli.stores.crops import Crops

write_pixel_store(Path(sys.argv[1]), Crops.open(*map(Path, sys.argv[2:])), seed=0)
