"""The processes of a broker: ``shmbroker.interpreter`` and ``shmbroker worker`` start them with ``python -P -m``.

Started by hand, without ``-P``, they would import what lies in the current directory under the name of something they
use. This file runs before any of them; ``-m`` itself has imported little more than os by then.
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # as long as the module to run is still looked for
    del sys.path[0]  # the current directory; where PYTHONPATH names it, it stays
