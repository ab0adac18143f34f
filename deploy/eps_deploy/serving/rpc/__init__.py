"""The Open Inference Protocol over gRPC, beside HTTP: `eps-serve --grpc-port`.

From the bottom up: `wire` and `messages` (pure functions), `arrivals` (messages on their way),
`calls` (the six calls), `frame` (what is around each), `core` and `server` (grpcio).
"""

import os

# grpcio's C++ part writes lines of its own to stderr, among them some that any client can cause.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
