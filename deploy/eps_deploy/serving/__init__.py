"""The server of `eps-serve`: KServe v2 over HTTP, batching, limits, life cycle, metrics, a page.

No torch here. From the bottom up: `refusals`, `limits`, `tensors`, `contract`, `protocol` and
`pictures` (pure functions), `queueing` and `batching` (images on their way through the engine),
`proving`, `plan_cache` and `model` (a bundle that is loaded and proven), `service` (the model that
is served now), `metrics`, `envelope`, `parsing`, `frame`, `inference`, `forms`, `infer_schemas`,
`schemas`, `openapi` and `routes` (HTTP), `rpc` (gRPC), `shedding`, `connections`, `listening` and
`server` (the process).
"""
