import contextlib

from edgelora.bench.child import serve

with contextlib.suppress(KeyboardInterrupt):
    serve()
