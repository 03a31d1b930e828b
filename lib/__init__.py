"""What the scripts share."""

import os

# for matplotlib, whichever module imports it first: a notebook's value names a backend that is not
# installed here, and a cluster has no screen
os.environ["MPLBACKEND"] = "agg"
