"""Open Inference Protocol over gRPC, beside HTTP: `eps-serve --grpc-port`.

`core` accepts calls and wraps each of them, `flow_control` receives messages, `servicer` has the
methods and starts and stops the server.
"""

import os

# grpcio's C++ part logs to stderr by itself, among others lines that any client can cause.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Imported before protobuf, so that the error names the missing package that an extra brings.
import grpc  # noqa: F401
