"""Open Inference Protocol over gRPC, beside HTTP: `eps-serve --grpc-port`.

`flow_control` receives messages, `interceptor` wraps every call, `server` has the methods and the
server itself, `core` is the part that uses grpcio's private API.
"""

import os

# grpcio's C++ part logs to stderr by itself, among others lines that any client can cause.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Imported before protobuf, so that the error names the missing package that an extra brings.
import grpc  # noqa: F401
