"""Server of `eps-serve`: KServe v2 over HTTP and gRPC, dynamic batching, limits, metrics, a page.

From the bottom up: `protocol` (validation and encoding), `limits`, `batching`, `model` (a loaded
and proven bundle), `shadow`, `service` (the served model), `metrics`, `middleware`, `app` (HTTP),
`rpc` (gRPC), `connections` and `server` (the process). `healthcheck` is the command of the image's
HEALTHCHECK. Nothing here imports torch.
"""
