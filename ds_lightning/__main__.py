"""``python -m ds_lightning`` is ``ds-lightning``."""

import sys

from ds_lightning.cli import main

sys.exit(main())
