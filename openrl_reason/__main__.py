"""``python -m openrl_reason <command>``."""

import sys

from openrl_reason.cli import main

sys.exit(main())
