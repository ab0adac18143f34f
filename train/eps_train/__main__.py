"""`python -m eps_train` is `eps-train`; torchrun starts it so."""

from __future__ import annotations

import sys

from eps_train.cli import main

if __name__ == "__main__":
    sys.argv[0] = "eps-train"  # as which the messages name it
    main()
