"""``python -m zreconnect``: the command ``zreconnect``."""

import sys

from zreconnect.cli import main

sys.exit(main())
